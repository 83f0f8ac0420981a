"""Which spans of which source ranks fill one destination rank, and how a span is cut into slabs.

Heads are model-wide numbers until the last moment. With 4 KV heads, a source of TP 2 and a destination of TP 4:

    source rank 0   [ 0 1 ]           destination rank 0 [ 0 ]   reads head 0 of rank 0 (its local head 0)
    source rank 1       [ 2 3 ]       destination rank 1 [ 1 ]   reads head 1 of rank 0 (its local head 1)
                                      ...
"""

from collections.abc import Iterator
from dataclasses import replace

from core.errors import Incompatible
from core.kv_layout import DTYPE_BYTES, KVLayout
from core.messages.to_rank import Copy, Span

_MUST_MATCH = ("num_layers", "num_kv_heads", "head_dim", "block_size", "dtype")


def require_exchangeable(ours: KVLayout, theirs: KVLayout) -> None:
    """Raises Incompatible naming the first field, tensor parallel degree aside, in which two layouts differ."""
    for name in _MUST_MATCH:
        here, there = getattr(ours, name), getattr(theirs, name)
        if here != there:
            raise Incompatible(f"KV layout: {name} differs: {here!r} here, {there!r} there", field=name)


def plan_copies(
    source: KVLayout,
    destination: KVLayout,
    destination_rank: int,
    first_layer: int,
    num_layers: int,
    source_blocks: tuple[int, ...],
    destination_blocks: tuple[int, ...],
) -> tuple[Copy, ...]:
    """Copies that fill `destination_blocks` of one rank with the content of `source_blocks`, in order of heads.

    Every head is read from exactly one source rank, and a source rank occurs at most once. Block ids are physical,
    equal in number, and the same in all ranks of a replica. Raises Incompatible.
    """
    require_exchangeable(source, destination)
    assert len(source_blocks) == len(destination_blocks), "each source block has one destination block"
    assert first_layer >= 0 and first_layer + num_layers <= source.num_layers
    copies = []
    wanted = destination.heads_of_rank(destination_rank)
    for source_rank, heads in _runs_of_heads(source, wanted, destination_rank):
        held = source.heads_of_rank(source_rank)
        taken = Span(first_layer, num_layers, source_blocks, heads.start - held.start, len(heads))
        filled = Span(first_layer, num_layers, destination_blocks, heads.start - wanted.start, len(heads))
        copies.append(Copy(source_rank, taken, filled))
    return tuple(copies)


def split_into_slabs(copy: Copy, layout: KVLayout, slab_bytes: int) -> tuple[Copy, ...]:
    """Cuts a copy into pieces of at most `slab_bytes`, by blocks, or by layers too when one block is larger.

    One layer of one block is never cut, however large. `layout` may be that of either side.
    """
    cell_bytes = 2 * copy.source.num_heads * layout.block_size * layout.head_dim * DTYPE_BYTES[layout.dtype]
    num_layers, num_blocks = copy.source.num_layers, len(copy.source.blocks)
    layers_at_once = min(num_layers, max(1, slab_bytes // cell_bytes))
    blocks_at_once = max(1, slab_bytes // (cell_bytes * num_layers))
    return tuple(
        replace(
            copy,
            source=_part(copy.source, layer, layers_at_once, block, blocks_at_once),
            destination=_part(copy.destination, layer, layers_at_once, block, blocks_at_once),
        )
        for block in range(0, num_blocks, blocks_at_once)
        for layer in range(0, num_layers, layers_at_once)
    )


def _runs_of_heads(source: KVLayout, wanted: range, destination_rank: int) -> Iterator[tuple[int, range]]:
    """(source rank, model-wide heads) covering `wanted`; neighbouring heads of one rank come as one run."""
    start = wanted.start
    while start < wanted.stop:
        rank = _source_rank(source, start, destination_rank)
        stop = min(source.heads_of_rank(rank).stop, wanted.stop)
        yield rank, range(start, stop)
        start = stop


def _source_rank(source: KVLayout, head: int, destination_rank: int) -> int:
    """The rank to read `head` from; where several replicate it, destination ranks take turns."""
    num_replicas = max(1, source.tensor_parallel // source.num_kv_heads)
    if num_replicas == 1:
        return head // source.heads_per_rank
    return head * num_replicas + destination_rank % num_replicas


def _part(span: Span, layer: int, num_layers: int, block: int, num_blocks: int) -> Span:
    return replace(
        span,
        first_layer=span.first_layer + layer,
        num_layers=min(num_layers, span.num_layers - layer),
        blocks=span.blocks[block : block + num_blocks],
    )
