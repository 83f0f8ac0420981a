"""How blocks of two sizes that hold the same tokens are cut into pieces of one size. Pure.

Tokens 16 to 63 of a sequence, in blocks of 32 at the source and of 16 at the destination; * is what is not exchanged:

    source         [ *  7b ] [ 2a 2b ]        physical blocks 7, 2
    destination       [ 5 ]  [ 9 ][ 4 ]       physical blocks 5, 9, 4
    pieces              15     4   5  -> 5, 9, 4
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Pieces:
    """Physical pieces of both sides, in the order of the sequence."""

    numbers: tuple[int, ...]  # logical: piece q holds tokens [q * size, (q + 1) * size) of the sequence
    source: tuple[int, ...]
    destination: tuple[int, ...]
    num_tokens: int  # of a piece, as in Span.block_tokens: 0 where a piece is a block of either side

    def share(self, number: int, num_shares: int) -> "Pieces":
        """Those whose logical number is `number` modulo `num_shares`."""
        kept = [index for index, piece in enumerate(self.numbers) if piece % num_shares == number]
        return replace(
            self,
            numbers=tuple(self.numbers[index] for index in kept),
            source=tuple(self.source[index] for index in kept),
            destination=tuple(self.destination[index] for index in kept),
        )


def match_pieces(
    source_size: int,
    destination_size: int,
    source_blocks: tuple[int, ...],
    destination_blocks: tuple[int, ...],
    tokens: range | None = None,
) -> Pieces:
    """Cuts both sides into pieces as large as the smaller block.

    `tokens` are the positions in the sequence to exchange; `source_blocks` and `destination_blocks` are the blocks that
    hold them, on the coarser side perhaps with others before and after. The first token begins a piece; a last piece
    that is filled in part counts as whole. Without `tokens` both sides begin with the sequence; the shorter ends it.
    """
    size = min(source_size, destination_size)
    if tokens is None:
        tokens = range(min(len(source_blocks) * source_size, len(destination_blocks) * destination_size))
    assert tokens.start % size == 0, f"token {tokens.start} lies inside of a piece of {size} tokens"
    pieces = range(tokens.start // size, -(-tokens.stop // size))
    return Pieces(
        tuple(pieces),
        _physical(pieces, source_blocks, source_size // size),
        _physical(pieces, destination_blocks, destination_size // size),
        size if source_size != destination_size else 0,
    )


def _physical(pieces: range, blocks: tuple[int, ...], num_pieces: int) -> tuple[int, ...]:
    """The physical pieces of logical ones; `blocks` hold exactly these, `num_pieces` each."""
    first_block = pieces.start // num_pieces
    num_blocks = -(-pieces.stop // num_pieces) - first_block
    assert len(blocks) == num_blocks, f"{len(blocks)} blocks where {len(pieces)} pieces lie in {num_blocks}"
    return tuple(blocks[piece // num_pieces - first_block] * num_pieces + piece % num_pieces for piece in pieces)
