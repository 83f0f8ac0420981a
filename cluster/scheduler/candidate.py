"""What a decision chooses among, and the terms of its cost in seconds. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from cluster.scheduler.replica_view import ReplicaView


class Terms(NamedTuple):
    """The parts of a request's predicted TTFT, which add up, and what else counts."""

    queue_s: float = 0.0  # work that whoever prefills has before it
    pull_s: float = 0.0  # a lender's prefix, over the link
    restore_s: float = 0.0  # its own prefix, from host memory or disk
    prefill_s: float = 0.0  # the rest of the prompt, computed
    transfer_s: float = 0.0  # what decode lacks, as far as no compute hides it
    wait_s: float = 0.0  # until decode's batch takes it in
    itl_s: float = 0.0  # of decode's batch with this request in it, beside the prompts that it computes
    evict_s: float = 0.0  # what others are likely to compute again, whose cached blocks it takes the place of
    work_s: float = 0.0  # what it is to others that a replica has its prompt to compute
    strain_s: float = 0.0  # what an ITL near its SLO or beyond counts for

    @property
    def ttft_s(self) -> float:
        """Sum of all that stands before the first token."""
        return self.queue_s + self.pull_s + self.restore_s + self.prefill_s + self.transfer_s + self.wait_s

    @property
    def cost_s(self) -> float:
        """What candidates are compared by."""
        return self.ttft_s + self.evict_s + self.work_s + self.strain_s

    @property
    def first_token_s(self) -> float:
        """Until the client sees its first token, which prefill draws before the transfer has ended."""
        return self.queue_s + self.pull_s + self.restore_s + self.prefill_s


class Candidate(NamedTuple):
    """One way to answer a request, by the names of its replicas; `prefill_id` is empty for local prefill."""

    prefill_id: str
    decode_id: str
    lender_id: str
    reason: str
    terms: Terms


class Decision(NamedTuple):
    """The chosen replicas, the terms that made them win, and what they won against."""

    prefill: ReplicaView | None  # None: decode prefills by itself
    decode: ReplicaView
    reason: str  # as in Plan
    terms: Terms
    num_uncached_tokens: int  # that whoever prefills must compute
    num_decode_blocks: int  # that the request will claim on decode for its prompt
    num_expected_tokens: float = 0.0  # that it will generate
    lender: ReplicaView | None = None  # whose cached prefix is pulled first
    crosses_zones: bool = False  # taken only when no candidate within one zone has room
    num_transfer_bytes: int = 0  # from prefill to decode
    num_cached_tokens: int = 0  # of the prompt, that whoever prefills will find cached or pulled
    num_indexed_tokens: int = 0  # of these, that were cached by then: the rest is still to be computed by others
    candidates: Sequence[Candidate] = ()  # the best of them, this one first

    @property
    def predicted_ttft_s(self) -> float:
        """From dispatch to the first token."""
        return self.terms.ttft_s
