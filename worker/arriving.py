"""Blocks of the pool for cached content that comes from elsewhere: another replica, or a tier below the device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from core.block_hash import BlockKey
from engine.block_pool import BlockPool

ChainKey = tuple[BlockKey, BlockKey | None]  # see core.kv_groups.chain_key


@contextmanager
def arriving(pool: BlockPool, before: Sequence[BlockKey], coming: Sequence[ChainKey]) -> Iterator[list[int]]:
    """Physical blocks for what is `coming`, being written; found by their keys once the body is left.

    `before`: what of it is cached is held meanwhile, so that it does not make room. When the body raises, nothing can
    be found. Raises OutOfBlocks.
    """
    held = [block for key in before for block in pool.match([key])]
    pool.own(held)
    try:
        blocks = pool.allocate(len(coming))
        pool.begin_write(blocks)
        try:
            yield blocks
            for block, chain_key in zip(blocks, coming, strict=True):
                pool.register(block, *chain_key)
        finally:
            pool.end_write(blocks)
            pool.disown(blocks)
    finally:
        pool.disown(held)
