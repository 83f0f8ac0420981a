"""A sequence's blocks of one KV group, while it runs. Pure.

logical   0 ........ first - 1 | first .... | .......... end - 1
          behind the window,     registered   not full yet, or
          given back                          not computed
"""

from collections.abc import Sequence

from core.block_hash import BlockHash, BlockKey, in_group
from core.kv_groups import KVGroup
from engine.batch import BlockTable


class GroupBlocks:
    """Which physical block holds which logical one; the caller owns and gives back."""

    def __init__(self, number: int, group: KVGroup, block_size: int) -> None:
        self.number = number
        self.group = group
        self.first = 0
        self.blocks: list[int] = []  # physical, in logical order
        self._block_size = block_size
        self._num_registered = 0  # of logical blocks, from the first on

    @property
    def end(self) -> int:
        """The logical block that comes next."""
        return self.first + len(self.blocks)

    def first_needed(self, num_tokens: int) -> int:
        """See KVGroup.first_needed."""
        return self.group.first_needed(num_tokens, self._block_size)

    def keys(self, hashes: Sequence[BlockHash], blocks: range) -> list[BlockKey]:
        """Of those of these logical blocks that have a hash."""
        return [in_group(block_hash, self.number) for block_hash in hashes[blocks.start : blocks.stop]]

    def begin(self, first: int, cached: list[int]) -> None:
        """The sequence begins with these, which can be found already."""
        assert not self.blocks
        self.first, self.blocks = first, cached
        self._num_registered = self.end

    def exchange(self, start: int, cached: list[int]) -> list[int]:
        """From logical block `start` on these, which can be found already, in place of others, which are returned."""
        assert self._num_registered <= start
        places = slice(start - self.first, start - self.first + len(cached))
        before, self.blocks[places] = self.blocks[places], cached
        assert len(before) == len(cached)
        self._num_registered = start + len(cached)
        return before

    def physical(self, logical: range) -> list[int]:
        """Of blocks that are held."""
        assert self.first <= logical.start <= logical.stop <= self.end
        return self.blocks[logical.start - self.first : logical.stop - self.first]

    def table(self, num_tokens: int) -> BlockTable:
        """For a step that ends at that many tokens."""
        return BlockTable(tuple(self.blocks[: -(-num_tokens // self._block_size) - self.first]), self.first)

    def most_held(self, num_tokens: int, num_at_once: int) -> int:
        """Blocks to hold at most from now until there are `num_tokens` tokens, in steps of at most `num_at_once`."""
        left = -(-num_tokens // self._block_size) - self.first
        most = self.group.most_at_once(num_at_once, self._block_size)
        return left if most is None else min(left, most)

    def newly_full(self, num_tokens: int) -> range:
        """Logical blocks that `num_tokens` computed tokens fill and that were not asked for before."""
        blocks = range(self._num_registered, num_tokens // self._block_size)
        self._num_registered = max(self._num_registered, blocks.stop)
        return blocks

    def chain_keys(
        self, hashes: Sequence[BlockHash], blocks: range
    ) -> tuple[list[BlockKey], Sequence[BlockKey | None]]:
        """Those of full blocks, and of the blocks without which these are of no use: see core.kv_groups.chain_key."""
        keys = self.keys(hashes, blocks)
        if self.group.window is not None:
            return keys, (None,) * len(keys)
        before = in_group(hashes[blocks.start - 1], self.number) if blocks.start else None
        return keys, (before, *keys[:-1])

    def take_behind(self, num_tokens: int) -> list[int]:
        """The blocks that no token after `num_tokens` others sees; no longer the sequence's."""
        num_behind = max(0, self.first_needed(num_tokens) - self.first)
        behind, self.blocks = self.blocks[:num_behind], self.blocks[num_behind:]
        self.first += num_behind
        return behind

    def take_all(self) -> list[int]:
        """All that are left."""
        blocks, self.blocks = self.blocks, []
        return blocks
