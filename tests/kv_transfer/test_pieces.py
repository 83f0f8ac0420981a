"""Blocks of two sizes meet in pieces of the smaller, wherever in a block the exchange begins and ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.pieces import match_pieces


def test_the_picture_of_the_module():
    pieces = match_pieces(32, 16, (7, 2), (5, 9, 4), range(16, 64))
    assert (pieces.source, pieces.destination, pieces.num_tokens) == ((15, 4, 5), (5, 9, 4), 16)
    assert pieces.numbers == (1, 2, 3)
    back = match_pieces(16, 32, (5, 9, 4), (7, 2), range(16, 64))
    assert (back.source, back.destination, back.num_tokens) == ((5, 9, 4), (15, 4, 5), 16)


def test_blocks_of_one_size_are_their_own_pieces():
    pieces = match_pieces(16, 16, (3, 1), (0, 2), range(32, 60))
    assert (pieces.source, pieces.destination, pieces.num_tokens) == ((3, 1), (0, 2), 0)


def test_without_tokens_the_shorter_side_ends_the_exchange():
    assert match_pieces(32, 16, (7, 2), (5, 9, 4)).source == (14, 15, 4)
    assert match_pieces(16, 32, (5, 9, 4), (7, 2)).destination == (14, 15, 4)


@pytest.mark.parametrize(
    ("blocks", "tokens"),
    [
        (((7,), (5, 9, 4)), range(16, 64)),
        (((7, 2), (5, 9)), range(16, 64)),
        (((7, 2, 3), (5, 9, 4)), range(16, 64)),
        (((7, 2), (5, 9, 4)), range(8, 56)),
    ],
)
def test_blocks_that_do_not_hold_the_tokens_are_a_mistake(blocks, tokens):
    with pytest.raises(AssertionError):
        match_pieces(32, 16, *blocks, tokens)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, 8, 16, 32]), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 9), st.integers(1, 300)
)
def test_every_token_meets_itself(size, factor, source_is_coarse, first_piece, num_tokens):
    sizes = (size * factor, size) if source_is_coarse else (size, size * factor)
    tokens = range(first_piece * size, first_piece * size + num_tokens)
    tables = [{number: 1000 - 3 * number for number in range(tokens.stop // side + 1)} for side in sizes]
    wanted = [range(tokens.start // side, (tokens.stop - 1) // side + 1) for side in sizes]
    held = [tuple(table[number] for number in numbers) for table, numbers in zip(tables, wanted, strict=True)]
    pieces = match_pieces(*sizes, *held, tokens)
    seen = []
    for taken, filled, number in zip(pieces.source, pieces.destination, pieces.numbers, strict=True):
        for side, piece, table in zip(sizes, (taken, filled), tables, strict=True):
            block, part = divmod(piece * size, side)
            assert table[number * size // side] == block and part == number * size % side
        seen += range(number * size, (number + 1) * size)
    assert seen[:num_tokens] == list(tokens) and len(seen) < num_tokens + size
