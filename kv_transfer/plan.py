"""Which spans of which source ranks fill one destination rank, and how a span is cut into slabs.

Heads are model-wide numbers until the last moment. With 4 KV heads, a source of TP 2 and a destination of TP 4:

    source rank 0   [ 0 1 ]           destination rank 0 [ 0 ]   reads head 0 of rank 0 (its local head 0)
    source rank 1       [ 2 3 ]       destination rank 1 [ 1 ]   reads head 1 of rank 0 (its local head 1)
                                      ...
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

    Layers are places in the blocks; block ids are physical and the same in all ranks of a replica.
    """

    source: KVLayout
    destination: KVLayout
    layers: range
    source_blocks: tuple[int, ...]
    destination_blocks: tuple[int, ...]
    tokens: range | None = None  # see `match_pieces`

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

    Tensor parallel degrees may differ, and block sizes of which one divides the other.
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
    """The ranks of a source that hold the heads of one rank, in order of heads; of latents, those that it takes its
    share from (see plan_stages). Raises Incompatible.
    """
    require_exchangeable(source, destination)
    if source.latent:
        apart = gcd(source.tensor_parallel, destination.tensor_parallel)
        return tuple(range(destination_rank % apart, source.tensor_parallel, apart))
    wanted = destination.heads_of_rank(destination_rank)
    return tuple(rank for rank, _ in _runs_of_heads(source, wanted, destination_rank))


def plan_copies(move: Move, destination_rank: int) -> tuple[Copy, ...]:
    """Copies that fill one rank's destination blocks with the content of the source blocks, in order of heads.

    Every head is read from exactly one source rank, and a source rank occurs at most once. Raises Incompatible.
    """
    source, destination = move.source, move.destination
    require_exchangeable(source, destination)
    first_layer, num_layers = move.layers.start, len(move.layers)
    assert first_layer >= 0 and first_layer + num_layers <= source.num_places
    pieces = move.pieces()
    copies = []
    wanted = destination.heads_of_rank(destination_rank)
    for source_rank, heads in _runs_of_heads(source, wanted, destination_rank):
        held = source.heads_of_rank(source_rank)
        taken = Span(first_layer, num_layers, pieces.source, heads.start - held.start, len(heads), pieces.num_tokens)
        first_head = heads.start - wanted.start
        filled = Span(first_layer, num_layers, pieces.destination, first_head, len(heads), pieces.num_tokens)
        copies.append(Copy(source_rank, taken, filled))
    return tuple(copies)


def plan_stages(move: Move, destination_rank: int) -> Stages:
    """As `plan_copies`, with what all ranks need alike taken from the source replica once. Raises Incompatible.

    Heads differ from rank to rank and have no second stage. Latents do not: piece q of the sequence goes from source
    rank q % TP there to destination rank q % TP here, and from there to its siblings. So each rank sends, receives and
    hands on the same share, however a sequence is announced.
    """
    whole = plan_copies(move, destination_rank)
    if not move.destination.latent:
        return Stages(whole)
    pieces = move.pieces()
    (copy,) = whole
    num_sources, num_siblings = move.source.tensor_parallel, move.destination.tensor_parallel
    ours = pieces.share(destination_rank, num_siblings)
    siblings = [(destination_rank + turn) % num_siblings for turn in range(1, num_siblings)]
    return Stages(
        tuple(
            _latents(copy, rank, share.source, share.destination)
            for rank in range(num_sources)
            if (share := ours.share(rank, num_sources)).source
        ),
        tuple(
            _latents(copy, rank, share.destination, share.destination)
            for rank in siblings
            if (share := pieces.share(rank, num_siblings)).source
        ),
    )


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


def _latents(copy: Copy, source_rank: int, taken: tuple[int, ...], filled: tuple[int, ...]) -> Copy:
    """The same layers of other pieces from another rank."""
    return Copy(source_rank, replace(copy.source, blocks=taken), replace(copy.destination, blocks=filled))


def _part(span: Span, layer: int, num_layers: int, block: int, num_blocks: int) -> Span:
    return replace(
        span,
        first_layer=span.first_layer + layer,
        num_layers=min(num_layers, span.num_layers - layer),
        blocks=span.blocks[block : block + num_blocks],
    )
