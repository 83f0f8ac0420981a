"""A sequence and its blocks: what is computed, what is cached, what the next step computes. Pure.

    token_ids  [ prompt ............................. | output ... | being drawn ]
    computed   [ KV in blocks ....... | in flight ... | to launch ............. ]
                                      ^ num_computed  ^ num_launched

Both pools' schedulers run sequences; only they differ in when.
"""

from itertools import chain

from core.block_hash import hash_block
from core.kv_groups import deepest_prefix
from core.kv_layout import KVLayout
from core.messages.to_decode import Sequence
from engine.batch import DRAWN, Draw, SequenceStep
from engine.block_pool import BlockPool, OutOfBlocks
from engine.group_blocks import GroupBlocks


class ActiveSequence:
    """Owns its blocks in the pool from the moment they are given to it until they are behind a window, or `release`.

    Blocks that its prompt will need in groups with a window are promised to it by `reserve`.
    """

    def __init__(self, pool: BlockPool, layout: KVLayout, sequence: Sequence) -> None:
        self.token_ids = list(sequence.token_ids)
        self.num_prompt = len(sequence.token_ids)
        self.num_forced = sequence.num_forced
        self.sampling = sequence.sampling
        self.block_size = layout.block_size
        self.groups = [GroupBlocks(i, group, layout.block_size) for i, group in enumerate(layout.kv_groups)]
        self._full_groups = [blocks for blocks in self.groups if blocks.group.window is None]
        self.num_computed = 0
        self.num_launched = 0  # computed, or being so by steps in flight
        self.num_drawing = 0  # tokens that steps in flight draw
        self._drawn_by: int | None = None  # where the last step launched has it, if that draws
        self.num_cached = 0  # prompt tokens found in the prefix cache
        self.num_acquired = 0  # blocks found in the cache
        self.num_promised = 0  # blocks that the pool keeps for the rest of the prompt
        self._pool = pool
        self._reaches = layout.reaches
        self._num_at_once = 0
        self._hash_root = sequence.hash_root
        self._hashes = list(sequence.block_hashes)

    @property
    def num_outputs(self) -> int:
        """Output tokens so far, over all attempts."""
        return self.num_forced + len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose KV is still missing; at least one while the sequence runs."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_known_to_launch(self) -> int:
        """Known tokens that no step was launched for."""
        return len(self.token_ids) - self.num_launched

    @property
    def num_to_launch(self) -> int:
        """As that, with tokens that are being drawn, unless these are the last."""
        if self.num_drawing and self.num_outputs + self.num_drawing >= self.sampling.max_tokens:
            return 0
        return self.num_known_to_launch + self.num_drawing

    def acquire_prefix(self) -> None:
        """Takes what a cached prefix leaves in place for the tokens after it, of which at least one is left to compute.

        Raises OutOfBlocks when promises need those blocks.
        """
        usable = self._hashes[: (self.num_prompt - 1) // self.block_size]
        depth = deepest_prefix(self._reaches, usable, self._pool.__contains__)
        self.num_computed = self.num_launched = self.num_cached = depth * self.block_size
        self._acquire([range(blocks.first_needed(self.num_computed), depth) for blocks in self.groups])

    def acquire_computed_since(self) -> None:
        """Before the first step: what others have computed of the prompt since takes the place of blocks that were
        allocated for it. In layouts of one group without a window; others let go of what is behind it.
        """
        if self.num_launched != self.num_cached or len(self.groups) > 1 or not self._full_groups:
            return
        (blocks,), start = self.groups, self.num_cached // self.block_size
        usable = range(start, min(len(self._hashes), (self.num_prompt - 1) // self.block_size, blocks.end))
        found = self._pool.match(blocks.keys(self._hashes, usable))
        if found:
            self._pool.disown(blocks.exchange(start, found))
            self._pool.own(found)  # there is room: as many were given back
            self.num_acquired += len(found)
            self.num_computed = self.num_launched = self.num_cached = (start + len(found)) * self.block_size

    def acquire_received(self) -> None:
        """Takes what is cached of the blocks that the token after the prompt sees: from the first one on, by group.

        The others are to come by transfer. Raises OutOfBlocks when promises need those blocks.
        """
        end = len(self._hashes)
        self._acquire([range(blocks.first_needed(self.num_prompt), end) for blocks in self.groups])

    def adopt(self, blocks: list[list[int]], num_computed: int) -> None:
        """Takes over blocks, by group, that are owned already and whose content arrived by transfer."""
        for group, arrived in zip(self.groups, blocks, strict=True):
            group.blocks += arrived
        self.num_computed = self.num_launched = num_computed
        self._register_full_blocks()

    def reserve(self, num_at_once: int) -> None:
        """Allocates blocks for the whole prompt, but for those of groups with a window: as many of these are promised
        as steps of at most `num_at_once` tokens need at a time. Raises OutOfBlocks.
        """
        self._num_at_once = num_at_once
        needed = self._num_to_promise()
        if needed + self._num_to_allocate(self.num_prompt, self._full_groups) > self._pool.num_free:
            raise OutOfBlocks(f"{self.num_prompt} tokens want more blocks than the {self._pool.num_free} that are free")
        self._allocate(self.num_prompt, self._full_groups)
        self._promise(needed)

    def num_blocks_lacking(self, num_tokens: int) -> int:
        """Blocks to allocate, beyond those promised, so that positions up to `num_tokens` have a place."""
        return max(0, self._num_to_allocate(num_tokens, self.groups) - self.num_promised)

    def grow(self, num_tokens: int) -> None:
        """Allocates blocks for positions up to `num_tokens`. Raises OutOfBlocks."""
        if self.num_blocks_lacking(num_tokens) > self._pool.num_free:
            raise OutOfBlocks(f"no place for tokens up to {num_tokens}: {self._pool.num_free} blocks are free")
        self._allocate(num_tokens, self.groups)

    def launch(self, num_tokens: int, number: int) -> SequenceStep:
        """The step, with this number in its batch, that computes the next `num_tokens` tokens, drawing after the last.

        Positions up to there must have a place.
        """
        start, end = self.num_launched, self.num_launched + num_tokens
        tables = tuple(blocks.table(end) for blocks in self.groups)
        token_ids, drawn_by = tuple(self.token_ids[start:end]), None
        if len(token_ids) < num_tokens:
            token_ids, drawn_by = (*token_ids, DRAWN), self._drawn_by
            assert token_ids == (DRAWN,), "what is known is launched before what is being drawn"
            assert drawn_by is not None
        draw = self._draw() if end == len(self.token_ids) + self.num_drawing else None
        self.num_launched = end
        self.num_drawing += draw is not None
        self._drawn_by = number if draw is not None else None
        return SequenceStep(token_ids, start, tables, draw, drawn_by)

    def blocks_written_by(self, num_tokens: int) -> list[int]:
        """Physical blocks that the launch of `num_tokens` tokens writes."""
        start, end = self.num_launched, self.num_launched + num_tokens
        logical = range(start // self.block_size, -(-end // self.block_size))
        return [block for blocks in self.groups for block in blocks.physical(logical)]

    def advance(self, num_tokens: int) -> None:
        """A step's KV is in place: full blocks become findable, those behind a window are given back."""
        self.num_computed += num_tokens
        self._register_full_blocks()
        for blocks in self.groups:
            self._pool.disown(blocks.take_behind(self.num_computed))
        self._promise(self._num_to_promise() - self.num_promised)

    def changes(self, num_steps: int) -> set[tuple[int, bool]]:
        """When blocks change hands during the next steps of one token each: (step, counted from 1, whether at its end).

        A step that begins a block takes one; one that fills a block makes it findable; behind a window one is given
        back. No step may be in flight.
        """
        size, done = self.block_size, self.num_computed
        if done % size and done % size + num_steps < size and len(self._full_groups) == len(self.groups):
            return set()
        begins = range(-done % size + 1, num_steps + 1, size)
        ends = [size - done % size]
        for blocks in self.groups:
            if blocks.group.window is not None:
                ends.append((blocks.group.window - 2 - done) % size + 1)
        return {(step, False) for step in begins} | {
            (step, True) for first in ends for step in range(first, num_steps + 1, size)
        }

    def pass_over(self, num_computed: int) -> None:
        """As launches and advances, one token each, up to there; blocks for them are in place."""
        self.num_launched = num_computed
        self.advance(num_computed - self.num_computed)

    def append(self, token_id: int) -> str | None:
        """Takes a drawn token; "stop" or "length" when it ends the output."""
        self.num_drawing = max(0, self.num_drawing - 1)  # the first token of a prompt computed elsewhere: none is
        self.token_ids.append(token_id)
        if token_id in self.sampling.stop_token_ids:
            return "stop"
        return "length" if self.num_outputs >= self.sampling.max_tokens else None

    def release(self) -> None:
        """Gives all blocks back; steps and transfers in flight keep theirs until they end. Idempotent."""
        for blocks in self.groups:
            self._pool.disown(blocks.take_all())
        self._promise(-self.num_promised)

    def _acquire(self, wanted: list[range]) -> None:
        """Owns, by group, what is cached of these logical blocks from the first one on."""
        found = [
            self._pool.match(blocks.keys(self._hashes, logical))
            for blocks, logical in zip(self.groups, wanted, strict=True)
        ]
        self._pool.own(list(chain.from_iterable(found)))
        self.num_acquired = sum(map(len, found))
        for blocks, logical, cached in zip(self.groups, wanted, found, strict=True):
            blocks.begin(logical.start, cached)

    def _num_to_allocate(self, num_tokens: int, groups: list[GroupBlocks]) -> int:
        end = -(-num_tokens // self.block_size)
        return sum(max(0, end - blocks.end) for blocks in groups)

    def _allocate(self, num_tokens: int, groups: list[GroupBlocks]) -> None:
        """There must be room; what is promised goes first."""
        needed = self._num_to_allocate(num_tokens, groups)
        num_promised = min(needed, self.num_promised)
        fresh = iter(self._pool.allocate(needed - num_promised) + self._pool.allocate(num_promised, promised=True))
        self.num_promised -= num_promised
        for blocks in groups:
            blocks.blocks += [next(fresh) for _ in range(self._num_to_allocate(num_tokens, [blocks]))]

    def _num_to_promise(self) -> int:
        """Blocks that groups with a window still want for the prompt, beside those that they hold."""
        if self.num_computed >= self.num_prompt:
            return 0
        windowed = [blocks for blocks in self.groups if blocks.group.window is not None]
        most = (blocks.most_held(self.num_prompt, self._num_at_once) - len(blocks.blocks) for blocks in windowed)
        return sum(max(0, wanted) for wanted in most)

    def _promise(self, num_more: int) -> None:
        """As far as there is room: blocks that were given back may still be held by others."""
        if num_more < 0:
            self._pool.unpromise(-num_more)
        else:
            num_more = min(num_more, self._pool.num_free)
            self._pool.promise(num_more)
        self.num_promised += num_more

    def _draw(self) -> Draw:
        s = self.sampling
        return Draw(s.temperature, s.top_p, s.top_k, s.seed, s.num_logprobs)

    def _register_full_blocks(self) -> None:
        self._hash_full_blocks()
        for blocks in self.groups:
            if logical := blocks.newly_full(self.num_computed):
                keys, parents = blocks.chain_keys(self._hashes, logical)
                self._pool.register_all(blocks.physical(logical), keys, parents, self._hash_root)

    def _hash_full_blocks(self) -> None:
        """Those of generated tokens are made when first needed."""
        for index in range(len(self._hashes), self.num_computed // self.block_size):
            parent = self._hashes[index - 1] if index else self._hash_root
            start = index * self.block_size
            self._hashes.append(hash_block(parent, self.token_ids[start : start + self.block_size]))
