"""What the scheduler knows of one replica: its last report, and what its own reservations hold there. Pure."""

from dataclasses import dataclass, field
from itertools import islice

from cluster.scheduler.link_end import LinkEnd
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import ReplicaStatus

ROOFLINE_PREFILL_TOKENS_PER_S = 2000.0  # until a replica has reported its own


@dataclass(frozen=True)
class Growth:
    """A request in a decode batch: tokens when it joined, and how many more are expected."""

    num_tokens: int
    num_new_tokens: float
    since: float | None = None  # when its first token came; None: not yet


@dataclass(eq=False)
class ReplicaView:
    """One replica. Reservations count at once, reports lag behind. They change by `reserve_*` and `free*` alone."""

    info: ReplicaInfo
    status: ReplicaStatus
    seen_at: float
    usable: bool = False  # lives and takes new work; the fleet's to say
    num_cached_blocks: int = 0  # by the index
    prefill_tokens: dict[str, int] = field(default_factory=dict)  # request id -> uncached tokens reserved here
    decode_requests: dict[str, int] = field(default_factory=dict)  # request id -> blocks it may still claim here
    growth: dict[str, Growth] = field(default_factory=dict)  # request id -> what it will come to hold here
    num_reserved_tokens: int = 0  # sums of the three
    num_reserved_blocks: int = 0
    num_expected_tokens: float = 0.0
    reserved_prefill_s: float = 0.0
    link_end: LinkEnd = field(init=False)
    _prefill_s: dict[str, float] = field(default_factory=dict)  # request id -> seconds that its prefill takes
    _knows_all: bool = False  # at its last report a decode replica held nothing but what was sent from here
    _bytes_per_s: dict[str, float] = field(default_factory=dict)  # by source, as reported

    def __post_init__(self) -> None:
        self.link_end = LinkEnd(self.info)

    def hear(self, info: ReplicaInfo, status: ReplicaStatus, now: float) -> None:
        """A report."""
        if status.links is not self.status.links:
            self._bytes_per_s.clear()
        if info is not self.info:
            self.link_end = LinkEnd(info)
        self.info, self.status, self.seen_at = info, status, now
        num_there = status.num_waiting + status.num_running
        self._knows_all = info.role is Role.DECODE and 0 < num_there <= len(self.decode_requests)

    @property
    def outstanding_prefill_tokens(self) -> int:
        """Prompt tokens that stand before a new request.

        While the replica holds no more requests than were sent here, those that it does not hold yet are the newest.
        What is reserved is an upper bound then: prompts shrink as they are computed, in reports alone. A decode replica
        holds those that decode, too: when all it holds are known here, so is what they have left to compute, and a
        report from before a first token is out of date. Otherwise others sent some, or it does not say how many it
        holds; the larger of the two is believed.
        """
        status, reserved = self.status, self.num_reserved_tokens
        if self._knows_all:
            return reserved
        num_there, num_sent = status.num_waiting + status.num_running, len(self.prefill_tokens)
        if not reserved or not 0 < num_there <= num_sent:
            return max(status.num_waiting_tokens, reserved)
        coming = sum(islice(reversed(self.prefill_tokens.values()), num_sent - num_there))
        return min(reserved, status.num_waiting_tokens + coming)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Recent rate, or a guess."""
        return self.status.prefill_tokens_per_s or ROOFLINE_PREFILL_TOKENS_PER_S

    @property
    def num_decode_requests(self) -> int:
        """Requests that run or wait on this decode replica."""
        return max(self.status.num_running + self.status.num_waiting, len(self.decode_requests))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a new request can count on."""
        return self.status.num_free_blocks - self.num_reserved_blocks

    @property
    def num_reservations(self) -> int:
        """Requests that were sent here and have not left."""
        return len(self.prefill_tokens) + len(self.decode_requests)

    def bytes_per_s_from(self, source_id: str) -> float:
        """Measured speed of KV from a replica, by its last report; 0 while unknown."""
        if not self._bytes_per_s and self.status.links:
            self._bytes_per_s = {link.source_id: link.bytes_per_s for link in self.status.links}
        return self._bytes_per_s.get(source_id, 0.0)

    def reserve_prefill(self, request_id: str, num_tokens: int, seconds: float) -> None:
        """A prompt is sent here."""
        self.free_prefill(request_id)
        self.prefill_tokens[request_id] = num_tokens
        self._prefill_s[request_id] = seconds
        self.num_reserved_tokens += num_tokens
        self.reserved_prefill_s += seconds

    def reserve_decode(self, request_id: str, num_blocks: int, growth: Growth) -> None:
        """A request will decode here."""
        self.free_decode(request_id)
        self.decode_requests[request_id] = num_blocks
        self.growth[request_id] = growth
        self.num_reserved_blocks += num_blocks
        self.num_expected_tokens += growth.num_tokens + growth.num_new_tokens

    def has_joined(self, request_id: str, now: float) -> None:
        """From here on the replica's own report counts the request's blocks."""
        if (num_blocks := self.decode_requests.get(request_id)) is not None:
            self.num_reserved_blocks -= num_blocks
            self.decode_requests[request_id] = 0
            known = self.growth[request_id]
            self.growth[request_id] = Growth(known.num_tokens, known.num_new_tokens, now)

    def free_prefill(self, request_id: str) -> None:
        """Idempotent."""
        self.num_reserved_tokens -= self.prefill_tokens.pop(request_id, 0)
        self.reserved_prefill_s -= self._prefill_s.pop(request_id, 0.0)
        if not self._prefill_s:
            self.reserved_prefill_s = 0.0  # without the rounding of what came and went

    def free_decode(self, request_id: str) -> None:
        """Idempotent."""
        self.num_reserved_blocks -= self.decode_requests.pop(request_id, 0)
        if (growth := self.growth.pop(request_id, None)) is not None:
            self.num_expected_tokens -= growth.num_tokens + growth.num_new_tokens
        if not self.growth:
            self.num_expected_tokens = 0.0
