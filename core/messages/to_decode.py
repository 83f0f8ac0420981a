"""What a decode replica's first rank is told, and its answers.

ingress  -> Open, Cancel, Tokens (stream), RenewLeases
prefill  -> Announce (blocks are ready to fetch), Commit (first token; nothing more will come), Abandon
"""

from dataclasses import dataclass

from core.block_hash import BlockHash
from core.messages.fleet import ReplicaInfo
from core.sampling import SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Sequence:
    """The tokens of a request as a worker sees them.

    The last `num_forced` tokens of `token_ids` are output that the client already has (after a resume):

        token_ids = [ prompt ................ | shown output ]
                                               <- num_forced ->
    """

    token_ids: tuple[int, ...]
    block_hashes: tuple[BlockHash, ...]  # of the full blocks of token_ids
    sampling: SamplingParams
    hash_root: BlockHash  # parent of the first block's hash: tenant and adapter
    num_forced: int = 0


@dataclass(frozen=True)
class Open:
    """Reserve room for a request on decode. Idempotent by (request_id, attempt); a higher attempt replaces a lower.

    `prefill` is None when decode shall prefill by itself.
    """

    request_id: str
    attempt: int
    ingress_id: str
    sequence: Sequence
    prefill: ReplicaInfo | None
    timeout_s: float
    due_s: float = 0.0  # until the client should have its first tokens; what is due first travels first
    pull_from: ReplicaInfo | None = None  # has a longer prefix cached; only with `prefill` None
    pull_patience_s: float = 0.0  # as in Plan


@dataclass(frozen=True)
class Ticket:
    """Decode's answer to Open: what prefill must deliver, and where."""

    request_id: str
    attempt: int
    lease_id: int
    decode: ReplicaInfo
    first_missing_block: int  # logical; blocks before it are cached on decode and never sent
    num_blocks: int  # logical blocks of the whole sequence; [first_missing_block, num_blocks) shall come
    first_missing_blocks: tuple[int, ...] = ()  # by KV group, of which the first is above; empty: there is one

    @property
    def missing(self) -> tuple[range, ...]:
        """Logical blocks that shall come, by KV group; of one with a window those that decode will see alone."""
        firsts = self.first_missing_blocks or (self.first_missing_block,)
        return tuple(range(first, self.num_blocks) for first in firsts)


@dataclass(frozen=True)
class Cancel:
    """Ends a request on decode, or on prefill, whatever its state. May overtake its Open or Prefill."""

    request_id: str
    attempt: int  # this attempt and all lower ones


@dataclass(frozen=True)
class Announce:
    """Blocks of some layers of a KV group are computed on prefill and may be fetched until decode releases them."""

    request_id: str
    attempt: int
    lease_id: int
    number: int  # 0, 1, 2, ... of this attempt's announcements
    source: ReplicaInfo
    first_layer: int  # its place in blocks of the group
    num_layers: int
    first_block: int  # logical
    source_blocks: tuple[int, ...]  # physical ids in every source rank's pool
    group: int = 0


@dataclass(frozen=True)
class Commit:
    """The closing message of prefill: the first token, and how many announcements there were."""

    request_id: str
    attempt: int
    lease_id: int
    num_announcements: int
    first_token: int
    num_cached_tokens: int = 0  # of the prompt, found in prefill's prefix cache


@dataclass(frozen=True)
class Abandon:
    """Prefill gives an attempt up (cancelled, or finished on its first token); decode stops fetching and releases."""

    request_id: str
    attempt: int
    lease_id: int


@dataclass(frozen=True)
class MakeRoom:
    """Others are waiting for what this batch request holds: its ingress is to plan the rest anew."""

    request_id: str
    attempt: int


@dataclass(frozen=True)
class RenewLeases:
    """An ingress heartbeat: these requests are still wanted."""

    ingress_id: str
    request_ids: tuple[str, ...]


@dataclass(frozen=True)
class RenewedLeases:
    """The named requests that decode does not know (any more)."""

    unknown: tuple[str, ...]


@dataclass(frozen=True)
class TokensFrom:
    """Opens an ingress's token stream; a newer stream of the same ingress replaces the older."""

    ingress_id: str


@dataclass(frozen=True)
class Phases:
    """Where a request's time went before its first decoded token, in seconds."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0  # first announcement to last byte
    fetching_s: float = 0.0  # of that, the fetches themselves, one after another
    exposed_transfer_s: float = 0.0  # last prefill step to last byte: what overlap did not hide
    first_decode_s: float = 0.0
    transfer_bytes: int = 0
    num_blocks_received: int = 0
    num_blocks_reused: int = 0


@dataclass(frozen=True)
class TokenEvent:
    """Tokens of one request in one frame.

    `first_index` counts output tokens from 0 over all attempts, so the receiver orders and de-duplicates.
    `finish_reason`: "stop", "length", or "resume" (preempted or draining: plan the rest anew), or "error".
    """

    request_id: str
    attempt: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    message: str = ""  # of an error
    num_cached_tokens: int | None = None  # with the first event of a local prefill
    phases: Phases | None = None  # with the first event of an attempt


@dataclass(frozen=True)
class TokenFrame:
    """One engine step's tokens for one ingress."""

    sequence: int
    events: tuple[TokenEvent, ...]
