"""A request on its way through the fleet: what its client asked, has been shown and waits for. Pure.

PLANNING --plan--> OPENING --ticket--> PREFILLING --first token--> HANDOVER --joined--> DECODING --> OVER
    ^                |                     |                          |                    |
    |                +-- no prefill replica ---------------------------------> DECODING    |
    +--- PAUSED <----+---------------------+--------------------------+--------------------+
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from enum import StrEnum

from core.block_hash import BlockHash, chain_seed, hash_blocks
from core.messages.to_decode import Sequence
from core.messages.to_scheduler import Plan
from core.sampling import SamplingParams
from simulator.traces.trace import Run, encoded, expand


class RequestState(StrEnum):
    """See the picture above."""

    PLANNING = "planning"
    OPENING = "opening"
    PREFILLING = "prefilling"
    HANDOVER = "handover"
    DECODING = "decoding"
    PAUSED = "paused"
    OVER = "over"


_S = RequestState
_END = {_S.PAUSED, _S.OVER}
_LEGAL = {
    _S.PLANNING: {_S.OPENING, *_END},
    _S.OPENING: {_S.PREFILLING, _S.DECODING, *_END},
    _S.PREFILLING: {_S.HANDOVER, *_END},
    _S.HANDOVER: {_S.DECODING, *_END},
    _S.DECODING: _END,
    _S.PAUSED: {_S.PLANNING, _S.OVER},
    _S.OVER: set[RequestState](),
}


@dataclass(eq=False, slots=True)
class Request:
    """`times` are those at which the client gets the tokens of the attempt under way, `shown` of those before."""

    request_id: str
    arrived_at: float
    prompt: tuple[int, ...]
    hashes: tuple[BlockHash, ...]
    output: tuple[int, ...]
    hash_root: BlockHash
    salt: str
    deadline: float
    state: RequestState = RequestState.PAUSED
    attempt: int = -1
    plan: Plan | None = None  # of the attempt under way
    last_plan: Plan | None = None
    shown: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    avoid: set[str] = field(default_factory=set)
    num_failures: int = 0  # in a row without progress
    num_resumes: int = 0
    num_cached: int | None = None  # of the prompt's tokens, by the first attempt that computed it
    queued_s: float = 0.0  # at the scheduler
    num_transfer_bytes: int = 0
    generation: str = ""  # whose weights made the shown tokens
    was_unknown: bool = False  # to decode, at the last heartbeat
    opened: bool = False
    slo_class: str = "standard"

    def to(self, state: RequestState) -> None:
        """The one door to another state."""
        assert state in _LEGAL[self.state], f"request {self.request_id}: {self.state} -> {state}"
        self.state = state

    def sequence(self, block_size: int) -> Sequence:
        """For an attempt: the prompt and what has been shown."""
        num_shown = len(self.shown)
        sampling = SamplingParams(len(self.output), temperature=0.0)
        if not num_shown:
            return Sequence(self.prompt, self.hashes, sampling, self.hash_root)
        token_ids = self.prompt + self.output[:num_shown]
        return Sequence(token_ids, hash_blocks(token_ids, block_size, self.salt), sampling, self.hash_root, num_shown)

    def end_attempt(self, now: float) -> int:
        """What has come until now stays shown; returns how many tokens that were."""
        num_new = bisect_right(self.times, now)
        self.shown += self.times[:num_new]
        self.times = []
        return num_new


def make_request(
    request_id: str,
    now: float,
    prompt: tuple[Run, ...],
    output: tuple[int, ...],
    salt: str,
    block_size: int,
    timeout_s: float,
    slo_class: str = "standard",
) -> Request:
    """As it arrives: hashed once."""
    hashes = hash_blocks(encoded(prompt), block_size, salt)
    root, deadline = chain_seed(salt), now + timeout_s
    return Request(request_id, now, expand(prompt), hashes, output, root, salt, deadline, slo_class=slo_class)
