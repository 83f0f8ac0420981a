"""The ITL beside prompts, compared with steps that are played one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.stalls import WINDOW_S, Stalls


def test_without_prompts_it_is_the_steps():
    assert Stalls().itl_s(0.01, 3.0) == 0.01


@given(
    step_s=st.floats(0.001, 0.05),
    chunk_s=st.floats(0.01, 0.075),
    num_chunks=st.integers(1, 4),
    busy=st.floats(0.3, 0.7),
)
def test_a_steady_load_gives_what_its_steps_give(step_s, chunk_s, num_chunks, busy):
    """Prompts of so many chunks, with plain steps between them: tokens by the time they take."""
    num_plain = 1 + int(num_chunks * chunk_s * (1 / busy - 1) / step_s)
    round_s = num_chunks * chunk_s + num_plain * step_s
    stalls, now = Stalls(), 0.0
    while now < 12 * WINDOW_S:
        stalls.add(num_chunks * chunk_s, num_chunks, now)
        now += round_s
    expected = round_s / (num_chunks + num_plain)
    assert stalls.itl_s(step_s, now - round_s / 2) == pytest.approx(expected, rel=0.02)


def test_what_is_long_ago_does_not_count():
    stalls = Stalls()
    stalls.add(2.0, 4, 0.0)
    assert stalls.itl_s(0.01, 0.1) > 0.015
    assert stalls.itl_s(0.01, 10 * WINDOW_S) == pytest.approx(0.01, rel=0.01)


def test_a_prompt_to_come_counts_as_if_it_were_there():
    one, other = Stalls(), Stalls()
    one.add(1.0, 3, 5.0)
    other.add(1.0, 3, 5.0)
    foreseen = one.itl_s(0.01, 5.0, 0.5, 2)
    other.add(0.5, 2, 5.0)
    assert other.itl_s(0.01, 5.0) == pytest.approx(foreseen)


def test_a_replica_that_only_computes_prompts_gives_a_token_each_step():
    stalls = Stalls()
    stalls.add(3 * WINDOW_S, 30, 0.0)
    assert stalls.itl_s(0.01, 0.0) == pytest.approx(WINDOW_S / 10)
