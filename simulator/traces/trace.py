"""A request of a trace. Tokens are known by identity alone: equal prefixes of two prompts are equal runs. Pure."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

OWN_TOKENS = 2**29  # from here on ids belong to one request alone
MOST_TOKENS = 10_000_000  # of a prompt or an answer
MOST_S = 31 * 86400.0  # until the last arrival


class Run(NamedTuple):
    """`length` times token id `first`, then as often the id after it, `number` ids in all; ids are below 2**31."""

    first: int
    length: int
    number: int = 1

    @property
    def num_tokens(self) -> int:
        """Of the whole run."""
        return self.length * self.number

    def split(self, num_tokens: int) -> tuple["Run", ...]:
        """The first `num_tokens` tokens, fewer than all: whole ids, and a part of one."""
        whole, part = divmod(num_tokens, self.length)
        head = (Run(self.first, self.length, whole), Run(self.first + whole, part))
        return tuple(run for run in head if run.num_tokens)

    def rest(self, num_tokens: int) -> tuple["Run", ...]:
        """What `split` leaves."""
        whole, part = divmod(num_tokens, self.length)
        if not part:
            return (Run(self.first + whole, self.length, self.number - whole),)
        tail = (
            Run(self.first + whole, self.length - part),
            Run(self.first + whole + 1, self.length, self.number - whole - 1),
        )
        return tuple(run for run in tail if run.num_tokens)


@dataclass(frozen=True)
class TracedRequest:
    """One arrival. `output` is what the model will say, so that a session's next prompt may begin with it."""

    request_id: str
    arrival_s: float  # since the trace began
    prompt: tuple[Run, ...]
    output: tuple[Run, ...]
    tenant: str = ""
    session: str = ""  # requests of one conversation or agent; empty: unknown
    slo_class: str = "standard"

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(run.num_tokens for run in self.prompt)

    @property
    def num_output_tokens(self) -> int:
        """Tokens until the request ends, at least one."""
        return sum(run.num_tokens for run in self.output)


def require_playable(request: TracedRequest) -> None:
    """Raises ValueError for an arrival, or for numbers of tokens, that no trace of a real fleet has."""
    name = request.request_id
    if not 0 <= request.arrival_s <= MOST_S:
        raise ValueError(f"{name} arrives at {request.arrival_s:g} s, not between 0 and {MOST_S:g} s")
    for part, runs in (("prompt", request.prompt), ("output", request.output)):
        if any(not (isinstance(number, int) and number >= 0) for run in runs for number in run):
            raise ValueError(f"{name} has a {part} whose tokens are no whole numbers from 0 on")
        if (num_tokens := sum(run.num_tokens for run in runs)) > MOST_TOKENS:
            raise ValueError(f"{name} has a {part} of {num_tokens} tokens; at most {MOST_TOKENS} are allowed")


def plain_request(
    request_id: str, arrival_s: float, num_prompt: int, num_output: int, number: int, tenant: str = ""
) -> TracedRequest:
    """One that has no prefix in common with any other; `number` is its own in the trace.

    Raises ValueError for fewer than no tokens.
    """
    if num_prompt < 0 or num_output < 0:
        raise ValueError(f"{request_id} has {num_prompt} tokens in and {num_output} out: neither may be below 0")
    own = own_token(number)
    prompt, output = Run(own, max(1, num_prompt)), Run(own, max(1, num_output))
    return TracedRequest(request_id, arrival_s, (prompt,), (output,), tenant)


def own_token(number: int) -> int:
    """A token that only the request of this number has. Raises ValueError beyond 2**30 requests."""
    if not 0 <= number < 2**30:
        raise ValueError(f"request number {number} is not below 2**30")
    return OWN_TOKENS + number


def expand(runs: Iterable[Run]) -> tuple[int, ...]:
    """The token ids that runs stand for."""
    token_ids: list[int] = []
    for first, length, number in runs:
        for token_id in range(first, first + number):
            token_ids += [token_id] * length
    return tuple(token_ids)


def encoded(runs: Iterable[Run]) -> "array[int]":
    """As `expand`, the way in which token ids are hashed fastest."""
    token_ids = array("i")
    for first, length, number in runs:
        for token_id in range(first, first + number):
            token_ids += array("i", (token_id,)) * length
    return token_ids


def runs_of_blocks(ids: Iterable[Run], num_tokens: int, own: int) -> tuple[Run, ...]:
    """The first `num_tokens` tokens of blocks; what they do not cover is the request's own."""
    head, _ = split_at(ids, num_tokens)
    covered = sum(run.num_tokens for run in head)
    return (*head, Run(own, num_tokens - covered)) if covered < num_tokens else head


def blocks(ids: Iterable[int], block_size: int) -> tuple[Run, ...]:
    """One block to each id, ids that follow one another in one run."""
    runs: list[Run] = []
    for block in ids:
        if runs and block == runs[-1].first + runs[-1].number:
            runs[-1] = runs[-1]._replace(number=runs[-1].number + 1)
        else:
            runs.append(Run(block, block_size))
    return tuple(runs)


def split_at(runs: Iterable[Run], num_tokens: int) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """The first `num_tokens` tokens, and the rest."""
    head: list[Run] = []
    tail: list[Run] = []
    for run in runs:
        taken = min(run.num_tokens, num_tokens)
        num_tokens -= taken
        head += run.split(taken) if taken < run.num_tokens else (run,)
        tail += run.rest(taken) if taken < run.num_tokens else ()
    return tuple(head), tuple(tail)
