"""Which spans of which source ranks fill one destination rank, and how a span is cut into slabs.

Heads are model-wide numbers until the last moment. With 4 KV heads, a source of TP 2 and a destination of TP 4:

    source rank 0   [ 0 1 ]           destination rank 0 [ 0 ]   reads head 0 of rank 0 (its local head 0)
    source rank 1       [ 2 3 ]       destination rank 1 [ 1 ]   reads head 1 of rank 0 (its local head 1)
                                      ...

Places of layers are model-wide as well, until then. 5 layers, 2 pipeline stages at the source and 3 at the destination:

    source rank 0   [ 0 1 2 ]         destination rank 0 [ 0 1 ]   reads places 0 and 1 of rank 0
    source rank 1         [ 3 4 ]     destination rank 1 [ 2 3 ]   reads place 2 of rank 0 and place 0 of rank 1
                                      destination rank 2 [ 4 ]     reads place 1 of rank 1
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from core.errors import Incompatible
from core.kv_layout import DTYPE_BYTES, KVLayout
from core.messages.to_rank import Copy, Span
from kv_transfer.pieces import Pieces, match_pieces

_MUST_MATCH = ("num_layers", "num_kv_heads", "head_dim", "latent", "dtype", "groups")


@dataclass(frozen=True)
class Move:
    """Layers of some blocks of one KV group, from one replica to another.

    Layers are places in the group's blocks, as numbered for the whole model; block ids are physical and the same in all
    ranks of a replica.
    """

    source: KVLayout
    destination: KVLayout
    layers: range
    source_blocks: tuple[int, ...]
    destination_blocks: tuple[int, ...]
    tokens: range | None = None  # see `match_pieces`
    group: int = 0

    def pieces(self) -> Pieces:
        """The blocks of both sides in pieces of one size."""
        sizes = self.source.block_size, self.destination.block_size
        return match_pieces(*sizes, self.source_blocks, self.destination_blocks, self.tokens)


@dataclass(frozen=True)
class Stages:
    """What one destination rank fetches: its part from the source replica, then, once every rank has its own, the rest.

    `source_rank` of the second stage is a rank of the destination replica.
    """

    from_source: tuple[Copy, ...]
    from_siblings: tuple[Copy, ...] = ()


def require_exchangeable(ours: KVLayout, theirs: KVLayout) -> None:
    """Raises Incompatible naming the first field that keeps two layouts from exchanging KV.

    Parallel degrees may differ, and block sizes of which one divides the other.
    """
    for name in _MUST_MATCH:
        here, there = getattr(ours, name), getattr(theirs, name)
        if here != there:
            raise Incompatible(f"KV layout: {name} differs: {here!r} here, {there!r} there", field=name)
    if ours.latent and ours.num_kv_heads != 1:
        raise Incompatible(f"KV layout: latents of num_kv_heads {ours.num_kv_heads}, not 1", field="num_kv_heads")
    here, there = ours.block_size, theirs.block_size
    if max(here, there) % min(here, there):
        raise Incompatible(
            f"KV layout: block_size {here} here, {there} there: neither divides the other", field="block_size"
        )


def source_ranks(source: KVLayout, destination: KVLayout, destination_rank: int) -> tuple[int, ...]:
    """The ranks of a source that hold layers and heads of one rank, in their order; of latents, those that it takes its
    share from (see plan_stages). Raises Incompatible.
    """
    require_exchangeable(source, destination)
    layers = destination.layers_of_stage(destination.stage_of(destination_rank))
    stages = [s for s in range(source.pipeline_parallel) if _overlap(source.layers_of_stage(s), layers)]
    part = destination.part_of(destination_rank)
    if source.latent:
        apart = gcd(source.tensor_parallel, destination.tensor_parallel)
        parts = [*range(part % apart, source.tensor_parallel, apart)]
    else:
        parts = [found for found, _ in _runs_of_heads(source, destination.heads_of_rank(destination_rank), part)]
    return tuple(stage * source.tensor_parallel + found for stage in stages for found in parts)


def plan_copies(move: Move, destination_rank: int) -> tuple[Copy, ...]:
    """Copies that fill one rank's destination blocks with what the source blocks hold, in order of layers and heads.

    Every head of a layer is read from exactly one source rank, and a source rank occurs at most once; there are none
    where the rank has none of the layers. Raises Incompatible.
    """
    source, destination = move.source, move.destination
    require_exchangeable(source, destination)
    assert 0 <= move.layers.start < move.layers.stop <= source.num_places
    part, heads = destination.part_of(destination_rank), destination.heads_of_rank(destination_rank)
    here = destination.places_of_stage(destination.stage_of(destination_rank), move.group)
    wanted = _overlap(here, move.layers)
    pieces = move.pieces()
    copies = []
    for stage in range(source.pipeline_parallel):
        there = source.places_of_stage(stage, move.group)
        places = _overlap(there, wanted)
        for source_part, run in _runs_of_heads(source, heads, part) if places else ():
            first_held = source.heads_of_rank(source_part).start
            shape = len(places), len(run), pieces.num_tokens
            taken = _span(places.start - there.start, pieces.source, run.start - first_held, *shape)
            filled = _span(places.start - here.start, pieces.destination, run.start - heads.start, *shape)
            copies.append(Copy(stage * source.tensor_parallel + source_part, taken, filled))
    return tuple(copies)


def plan_stages(move: Move, destination_rank: int) -> Stages:
    """As `plan_copies`, with what all ranks need alike taken from the source replica once. Raises Incompatible.

    Heads differ from rank to rank and have no second stage. Latents do not: piece q of the sequence goes from source
    part q % TP there to destination part q % TP here, and from there to its siblings, the other parts with the same
    layers. So each rank sends, receives and hands on the same share, however a sequence is announced.
    """
    whole = plan_copies(move, destination_rank)
    if not move.destination.latent:
        return Stages(whole)
    pieces = move.pieces()
    num_sources, num_siblings = move.source.tensor_parallel, move.destination.tensor_parallel
    part = move.destination.part_of(destination_rank)
    first_sibling = destination_rank - part
    ours = pieces.share(part, num_siblings)
    siblings = [(part + turn) % num_siblings for turn in range(1, num_siblings)]
    from_source, from_siblings = list[Copy](), list[Copy]()
    for copy in whole:
        first_source = copy.source_rank - move.source.part_of(copy.source_rank)
        from_source += (
            _latents(first_source + source, copy.source, share.source, copy.destination, share.destination)
            for source in range(num_sources)
            if (share := ours.share(source, num_sources)).source
        )
        from_siblings += (
            _latents(first_sibling + sibling, copy.destination, there, copy.destination, there)
            for sibling in siblings
            if (there := pieces.share(sibling, num_siblings).destination)
        )
    return Stages(tuple(from_source), tuple(from_siblings))


def split_into_slabs(copy: Copy, layout: KVLayout, slab_bytes: int) -> tuple[Copy, ...]:
    """Cuts a copy into parts of at most `slab_bytes`, by pieces, or by layers too when one piece is larger.

    One layer of one piece is never cut, however large. `layout` may be that of either side.
    """
    num_tokens = copy.source.block_tokens or layout.block_size
    row_bytes = num_tokens * layout.head_dim * DTYPE_BYTES[layout.dtype]
    cell_bytes = layout.num_planes * copy.source.num_heads * row_bytes
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


def _overlap(ours: range, theirs: range) -> range:
    return range(max(ours.start, theirs.start), min(ours.stop, theirs.stop))


def _span(
    first_layer: int, blocks: tuple[int, ...], first_head: int, num_layers: int, num_heads: int, block_tokens: int
) -> Span:
    return Span(first_layer, num_layers, blocks, first_head, num_heads, block_tokens)


def _runs_of_heads(source: KVLayout, wanted: range, destination_part: int) -> Iterator[tuple[int, range]]:
    """(part of a source stage, model-wide heads) covering `wanted`; neighbouring heads of one part come as one run."""
    start = wanted.start
    while start < wanted.stop:
        part = _source_part(source, start, destination_part)
        stop = min(source.heads_of_rank(part).stop, wanted.stop)
        yield part, range(start, stop)
        start = stop


def _source_part(source: KVLayout, head: int, destination_part: int) -> int:
    """The part to read `head` from; where several replicate it, those of the destination take turns."""
    num_replicas = max(1, source.tensor_parallel // source.num_kv_heads)
    if num_replicas == 1:
        return head // source.heads_per_rank
    return head * num_replicas + destination_part % num_replicas


def _latents(
    source_rank: int, source: Span, taken: tuple[int, ...], destination: Span, filled: tuple[int, ...]
) -> Copy:
    """The same layers of other pieces, perhaps from another rank."""
    return Copy(source_rank, replace(source, blocks=taken), replace(destination, blocks=filled))


def _part(span: Span, layer: int, num_layers: int, block: int, num_blocks: int) -> Span:
    return replace(
        span,
        first_layer=span.first_layer + layer,
        num_layers=min(num_layers, span.num_layers - layer),
        blocks=span.blocks[block : block + num_blocks],
    )
