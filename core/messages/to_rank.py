"""What any rank is told by its replica's first rank (FetchBlocks) and by transfer peers (Connect, Ready, CloseChannel).

A channel is the ordered pair (sender rank, receiver rank); its `generation` grows with every rebuild.
"""

from dataclasses import dataclass

from core.kv_layout import Compatibility, KVLayout


@dataclass(frozen=True)
class Span:
    """A rectangle of one rank's KV pool: layers x blocks x KV heads. Heads are rank-local."""

    first_layer: int
    num_layers: int
    blocks: tuple[int, ...]  # physical ids
    first_head: int
    num_heads: int


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


@dataclass(frozen=True)
class Connected:
    """Sender's answer: where both ends meet."""

    sender_incarnation: int
    rendezvous: str  # for the channel only: host:port of the sender's store, or what names its shared pool


@dataclass(frozen=True)
class SlabHeader:
    """What one slab carries; both ends derive its size and order from it alone."""

    sequence: int  # of this channel and generation, without gaps
    request_id: str
    attempt: int
    source: Span


@dataclass(frozen=True)
class Ready:
    """Receiver grants the next slabs of a channel; the sender sends exactly these, in this order."""

    receiver: str
    receiver_incarnation: int
    generation: int
    slabs: tuple[SlabHeader, ...]


@dataclass(frozen=True)
class CloseChannel:
    """The receiver gives a channel's generation up."""

    receiver: str
    receiver_incarnation: int
    generation: int


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


@dataclass(frozen=True)
class Fetched:
    """Bytes that the rank received and the seconds it took."""

    num_bytes: int
    seconds: float
