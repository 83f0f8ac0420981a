"""What prompts of a line leave to compute, against blocks that are counted one by one."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.shared_work import Left, Prompt, left_by_line
from core.block_hash import hash_blocks

BLOCK = 4
Tokens = st.lists(st.integers(0, 1), min_size=1, max_size=5)


def prompt(tokens: list[int], num_cached: int = 0, num_more: int = 1) -> Prompt:
    repeated = [token for token in tokens for _ in range(BLOCK)]
    return Prompt(hash_blocks(repeated, BLOCK), len(repeated) + num_more, min(num_cached, len(tokens)))


def test_the_first_has_what_it_shares_with_any_behind_it():
    line = [prompt([1, 1, 1, 0]), prompt([1, 1, 0]), prompt([0]), prompt([1, 1, 1, 1, 1])]
    assert left_by_line(line, BLOCK) == [Left(5, 12), Left(5), Left(5), Left(9)]


def test_what_somebody_has_is_nobodys_to_compute():
    line = [prompt([1, 1, 1], num_cached=2), prompt([1, 1, 1], num_cached=2, num_more=2), prompt([1, 1], num_cached=2)]
    assert left_by_line(line, BLOCK) == [Left(1, 4), Left(2), Left(1)]


@given(st.lists(Tokens, max_size=8))
def test_all_together_are_the_blocks_that_differ_where_nothing_is_cached(prompts):
    """Of those with one first block, as far as they go with the first of these."""
    line = [prompt(tokens) for tokens in prompts]
    found = left_by_line(line, BLOCK)
    first_of: dict[int, list[int]] = {}
    for tokens, left in zip(prompts, found, strict=True):
        first = first_of.setdefault(tokens[0], tokens)
        common = 0
        while first is not tokens and common < min(len(first), len(tokens)) and first[common] == tokens[common]:
            common += 1
        assert left.num_own + left.num_for_others == (len(tokens) - common) * BLOCK + 1
