"""What any rank is told by its replica's first rank (FetchBlocks, PreparePairs) and by transfer peers (the others).

A channel is the ordered pair (sender rank, receiver rank); its `generation` grows with every rebuild.
"""

from dataclasses import dataclass

from core.kv_layout import Compatibility, KVLayout


@dataclass(frozen=True)
class Span:
    """A rectangle of one rank's KV pool: layers x pieces of blocks x KV heads. Heads are rank-local.

    Layers are places in the pool's blocks, see core.kv_groups: the model's own numbers where that has one KV group and
    the replica one pipeline stage.

    A piece is a whole block, or one of the equal parts of `block_tokens` tokens that blocks are cut into where the
    other side's blocks are smaller. Blocks of 32 tokens in pieces of 16:

        block       0       1       2
        piece    [ 0 1 ] [ 2 3 ] [ 4 5 ]
    """

    first_layer: int
    num_layers: int
    blocks: tuple[int, ...]  # physical ids of pieces
    first_head: int
    num_heads: int
    block_tokens: int = 0  # tokens of a piece; 0: the pool's own block size

    def physical_blocks(self, block_size: int) -> tuple[int, ...]:
        """The blocks, each once, that the pieces lie in, of a pool with blocks of `block_size` tokens."""
        num_pieces = block_size // (self.block_tokens or block_size)
        return tuple(dict.fromkeys(piece // num_pieces for piece in self.blocks))


@dataclass(frozen=True)
class Offer:
    """A transport that a rank has; two ranks can have a channel of it when their offers are equal."""

    kind: str
    reach: str  # empty for a transport that crosses hosts


@dataclass(frozen=True)
class Connect:
    """Receiver asks sender to build its end of channel (sender, receiver)."""

    receiver: str  # the receiver rank's RPC address: its name in channel ids
    receiver_incarnation: int
    generation: int
    compatibility: Compatibility
    layout: KVLayout
    offers: tuple[Offer, ...] = ()  # transports, in order of the receiver's wish
    wire_dtype: str = ""  # what KV shall be converted to on its way; empty: travels as it is stored


@dataclass(frozen=True)
class Connected:
    """Sender's answer: where both ends meet."""

    sender_incarnation: int
    rendezvous: str  # for the channel only: host:port of the sender's store, or what names its shared pool
    kind: str = ""  # of the transport, one of the offers
    token: str = ""  # for this generation alone: the data plane lets in who knows it


@dataclass(frozen=True)
class SlabHeader:
    """What one slab carries; both ends derive its size and order from it alone."""

    sequence: int  # of this channel and generation, without gaps
    request_id: str
    attempt: int
    source: Span
    lease_id: int = 0
    logical_blocks: tuple[int, ...] = ()  # of the request, one for each block that `source` lies in
    group: int = 0  # of KV, that these blocks hold


@dataclass(frozen=True)
class Ready:
    """Receiver grants the next slabs of a channel; the sender sends exactly these, in this order."""

    receiver: str
    receiver_incarnation: int
    generation: int
    slabs: tuple[SlabHeader, ...]


@dataclass(frozen=True)
class Granted:
    """The sender's answer; a refused slab is skipped by both ends, its number is used up."""

    known: bool = True  # False: these slabs had been granted before
    refused: tuple[int, ...] = ()  # sequence numbers of slabs whose source does not hold what the request wants


@dataclass(frozen=True)
class DigestBlocks:
    """Receiver asks the sender what it should have got."""

    slabs: tuple[SlabHeader, ...]


@dataclass(frozen=True)
class BlockDigests:
    """64-bit digests of the slabs' content, in their order."""

    digests: tuple[int, ...]


@dataclass(frozen=True)
class PreparePairs:
    """A replica's first rank tells one of its ranks to connect to peers that it will fetch from soon."""

    addresses: tuple[str, ...]


@dataclass(frozen=True)
class ReadTimeline:
    """Asks a rank what it did for a request, or of late when `request_id` is empty."""

    request_id: str


@dataclass(frozen=True)
class TimelineEvent:
    """Something that a rank did for a request. Moments are of the rank's own monotonic clock.

    compute   layers of a chunk of its prompt, then draw: the first token, when the chunk is the last; first ranks only
    wait      a slab, from the order to its turn on the wire
    gather    a slab, at the sender of a channel that needs it in one piece
    wire      a slab, at both ends where both take part
    scatter   a slab, from where the wire left it to its blocks
    digest    comparing what came with what was sent
    handoff   all of it on decode, from Open until decode may go on; first ranks only
    """

    request_id: str
    attempt: int
    phase: str
    peer: str
    begun_at: float
    ended_at: float
    num_bytes: int


@dataclass(frozen=True)
class TimelineEvents:
    """The answer, in order of their ends."""

    events: tuple[TimelineEvent, ...]


@dataclass(frozen=True)
class CloseChannel:
    """The receiver gives a channel's generation up."""

    receiver: str
    receiver_incarnation: int
    generation: int


@dataclass(frozen=True)
class TierMove:
    """Each rank copies blocks between two of the places where it keeps them.

    Place 0 is the device's pool, its slots the block ids; the tiers below follow, the fastest first.
    """

    source: int
    destination: int
    source_slots: tuple[int, ...]
    destination_slots: tuple[int, ...]  # in the same order


@dataclass(frozen=True)
class Copy:
    """One fetch of a plan: from a span of a peer rank's pool into a span of ours, equal in shape."""

    source_rank: int
    source: Span
    destination: Span


@dataclass(frozen=True)
class FetchBlocks:
    """A replica's first rank tells one of its ranks what to fetch; answered when all bytes are in place."""

    request_id: str
    attempt: int
    source_addresses: tuple[str, ...]  # by rank
    source_layout: KVLayout
    copies: tuple[Copy, ...]
    timeout_s: float
    lease_id: int = 0
    first_block: int = 0  # logical; the first of source_blocks
    source_blocks: tuple[int, ...] = ()  # physical, in logical order
    due_s: float = 0.0  # until the request's client should see its next token
    group: int = 0  # of KV, that all these blocks hold


@dataclass(frozen=True)
class Fetched:
    """Bytes that the rank received and the seconds it took."""

    num_bytes: int
    seconds: float
    num_digests: int = 0  # slabs whose content was compared with the sender's
