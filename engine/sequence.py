"""A sequence and its blocks: what is computed, what is cached, what the next step computes. Pure.

    token_ids  [ prompt ............................. | output ... ]
    computed   [ KV in blocks ....... |  to compute   ]
                                      ^ num_computed

Both pools' schedulers run sequences; only they differ in when.
"""

from core.block_hash import BlockHash, hash_block
from core.messages.to_decode import Sequence
from engine.batch import Draw, SequenceStep
from engine.block_pool import BlockPool


class ActiveSequence:
    """Owns its blocks in the pool from the moment they are given to it until `release`."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        sequence: Sequence,
    ) -> None:
        self.token_ids = list(sequence.token_ids)
        self.num_prompt = len(sequence.token_ids)
        self.num_forced = sequence.num_forced
        self.sampling = sequence.sampling
        self.blocks: list[int] = []
        self.num_computed = 0
        self.num_cached = 0  # prompt tokens found in the prefix cache
        self._pool = pool
        self.block_size = block_size
        self._hash_root = sequence.hash_root
        self._hashes = list(sequence.block_hashes)
        self._num_registered = 0

    @property
    def num_outputs(self) -> int:
        """Output tokens so far, over all attempts."""
        return self.num_forced + len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose KV is still missing; at least one while the sequence runs."""
        return len(self.token_ids) - self.num_computed

    def acquire_prefix(self, *, keep_last: bool) -> None:
        """Takes the cached prefix. `keep_last`: leave at least one token to compute, for its logits."""
        assert not self.blocks
        usable = (self.num_prompt - 1) // self.block_size if keep_last else len(self._hashes)
        self.blocks = self._pool.acquire_cached(self._hashes[:usable])
        self._num_registered = len(self.blocks)
        self.num_computed = self.num_cached = len(self.blocks) * self.block_size

    def adopt(self, blocks: list[int], num_computed: int) -> None:
        """Takes over blocks that are owned already and whose content arrived by transfer."""
        self.blocks += blocks
        self.num_computed = num_computed
        self._register_full_blocks()

    def num_blocks_to_hold(self, num_tokens: int) -> int:
        """Blocks still to allocate so that positions up to `num_tokens` have a place."""
        return max(0, -(-num_tokens // self.block_size) - len(self.blocks))

    def grow(self, num_tokens: int) -> None:
        """Allocates blocks for positions up to `num_tokens`. Raises OutOfBlocks."""
        needed = self.num_blocks_to_hold(num_tokens)
        if needed:
            self.blocks += self._pool.allocate(needed)

    def next_step(self, num_tokens: int) -> SequenceStep:
        """The step that computes the next `num_tokens` known tokens, drawing when it reaches the last of them."""
        start, end = self.num_computed, self.num_computed + num_tokens
        table = self.blocks[: -(-end // self.block_size)]
        return SequenceStep(tuple(self.token_ids[start:end]), start, tuple(table), self._draw(end))

    def blocks_written_by(self, num_tokens: int) -> list[int]:
        """Physical blocks that `next_step(num_tokens)` writes."""
        start, end = self.num_computed, self.num_computed + num_tokens
        return self.blocks[start // self.block_size : -(-end // self.block_size)]

    def advance(self, num_tokens: int) -> None:
        """A step's KV is in place; full blocks become findable."""
        self.num_computed += num_tokens
        self._register_full_blocks()

    def append(self, token_id: int) -> str | None:
        """Takes a drawn token; "stop" or "length" when it ends the output."""
        self.token_ids.append(token_id)
        if token_id in self.sampling.stop_token_ids:
            return "stop"
        return "length" if self.num_outputs >= self.sampling.max_tokens else None

    def release(self) -> None:
        """Gives all blocks back; steps and transfers in flight keep theirs until they end. Idempotent."""
        self._pool.disown(self.blocks)
        self.blocks = []

    def _draw(self, end: int) -> Draw | None:
        if end < len(self.token_ids):
            return None
        s = self.sampling
        return Draw(s.temperature, s.top_p, s.top_k, s.seed, s.num_logprobs)

    def _register_full_blocks(self) -> None:
        while (self._num_registered + 1) * self.block_size <= self.num_computed:
            index = self._num_registered
            self._pool.register(self.blocks[index], self._hash(index), self._hashes[index - 1] if index else None)
            self._num_registered += 1

    def _hash(self, index: int) -> BlockHash:
        """Hash of a full block; those of generated tokens are made when first needed."""
        if index == len(self._hashes):
            parent = self._hashes[index - 1] if index else self._hash_root
            start = index * self.block_size
            self._hashes.append(hash_block(parent, self.token_ids[start : start + self.block_size]))
        return self._hashes[index]
