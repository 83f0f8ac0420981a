"""What any replica is told by another that wants what it has: prefix blocks (the first rank), weights (each rank).

any replica -> Borrow (the blocks stay readable until GiveBack, or until the loan expires), GiveBack
"""

from dataclasses import dataclass

from core.block_hash import BlockHash
from core.kv_layout import Compatibility
from core.messages.fleet import ReplicaInfo


@dataclass(frozen=True)
class Borrow:
    """Asks for consecutive blocks of a sequence, by content. Repeatable."""

    loan_id: str
    block_hashes: tuple[BlockHash, ...]
    first_block: int  # logical, of the first hash
    group: int | None = None  # of KV, from that alone; None: from all what it takes to go on behind these blocks


@dataclass(frozen=True)
class TakeOver:
    """From the scheduler: bring these leading blocks of many prompts into your cache, from a replica that has them."""

    name: str  # unique in the fleet
    block_hashes: tuple[BlockHash, ...]
    source: ReplicaInfo


@dataclass(frozen=True)
class LentBlocks:
    """Consecutive blocks of one KV group."""

    group: int
    first_block: int  # logical
    source_blocks: tuple[int, ...]  # physical


@dataclass(frozen=True)
class Lent:
    """Where those of the leading blocks lie that are cached; none is an answer, too."""

    source: ReplicaInfo
    source_blocks: tuple[int, ...]  # physical, of the first KV group
    groups: tuple[LentBlocks, ...] = ()  # of all KV groups, those without any left out


@dataclass(frozen=True)
class GiveBack:
    """The loan's blocks are no longer read. Repeatable; may overtake its Borrow."""

    loan_id: str


@dataclass(frozen=True)
class BorrowWeights:
    """A rank that starts asks a rank of the same number in another replica for its weights. Repeatable."""

    loan_id: str  # made by the borrower, not to be guessed: who knows it may read
    weights: Compatibility


@dataclass(frozen=True)
class LentWeights:
    """The blocks of the lender's window pool through which the weights go: two windows, filled in turn."""

    windows: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class FillWindow:
    """The borrower has read what the window held, and wants a run of the weights' bytes there. Keeps the loan."""

    loan_id: str
    window: int
    first_byte: int
    num_bytes: int


@dataclass(frozen=True)
class GiveBackWeights:
    """The windows are no longer read."""

    loan_id: str
