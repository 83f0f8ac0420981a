"""What a prefill replica's first rank is told, and its answers.

ingress -> Prefill (open until the first token; losing the call cancels it), Cancel (see to_decode)
decode  -> Release (announced blocks are no longer read)
"""

from dataclasses import dataclass

from core.messages.fleet import ReplicaInfo
from core.messages.to_decode import Sequence, Ticket
from core.sampling import TokenLogprobs


@dataclass(frozen=True)
class Prefill:
    """Compute a sequence's missing KV, announce it to decode as it comes, sample the first token."""

    request_id: str
    attempt: int
    sequence: Sequence
    ticket: Ticket
    timeout_s: float
    pull_from: ReplicaInfo | None = None  # has a longer prefix cached than this replica
    pull_patience_s: float = 0.0  # as in Plan


@dataclass(frozen=True)
class FirstToken:
    """Prefill's answer. With a `finish_reason` ("stop" or "length") the request is over and decode holds nothing."""

    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    num_cached_tokens: int
    queue_s: float
    prefill_s: float


@dataclass(frozen=True)
class Release:
    """Decode has all bytes of an attempt, or will never read them: readers end."""

    request_id: str
    attempt: int
