"""What any replica's first rank is told by another that wants prefix blocks which it has cached.

any replica -> Borrow (the blocks stay readable until GiveBack, or until the loan expires), GiveBack
"""

from dataclasses import dataclass

from core.block_hash import BlockHash
from core.messages.fleet import ReplicaInfo


@dataclass(frozen=True)
class Borrow:
    """Asks for consecutive blocks of a sequence, by content. Repeatable."""

    loan_id: str
    block_hashes: tuple[BlockHash, ...]
    first_block: int  # logical, of the first hash


@dataclass(frozen=True)
class Lent:
    """Where those of the leading blocks lie that are cached; none is an answer, too."""

    source: ReplicaInfo
    source_blocks: tuple[int, ...]  # physical


@dataclass(frozen=True)
class GiveBack:
    """The loan's blocks are no longer read. Repeatable; may overtake its Borrow."""

    loan_id: str
