"""Dead band and delays, second by second."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling.smoothing import Smoothing, outside_dead_band
from core.autoscaling_config import AutoscalingConfig

CONFIG = AutoscalingConfig(upscale_delay_s=3, downscale_delay_s=10, downscale_step=2, downscale_pause_s=4)


def test_demand_near_what_stands_changes_nothing():
    assert [outside_dead_band(demand, 4, 0.1) for demand in (4.4, 4.3, 3.7, 3.61)] == [4, 4, 4, 4]
    assert [outside_dead_band(demand, 4, 0.1) for demand in (4.5, 9.0, 2.6, 0.0)] == [5, 9, 3, 0]


@given(st.floats(0, 50), st.floats(0, 0.5))
def test_a_constant_demand_is_reached_in_one_move_and_then_stays(demand, dead_band):
    for start in range(60):
        once = outside_dead_band(demand, start, dead_band)
        assert outside_dead_band(demand, once, dead_band) == once
        assert once * (1 + dead_band) >= demand - 1e-6


def run(wanted: list[int], current: int, config: AutoscalingConfig = CONFIG) -> list[int]:
    smoothing, sizes = Smoothing(config), []
    for now, want in enumerate(wanted):
        current = smoothing.step(float(now), want, current)
        sizes.append(current)
    return sizes


def test_growth_waits_for_the_delay_and_goes_to_what_was_wanted_throughout():
    assert run([5, 7, 6, 8, 8], current=2) == [2, 2, 2, 5, 6]


def test_a_spike_shorter_than_the_delay_grows_nothing():
    assert run([9, 9, 1, 9, 9, 9, 1], current=2) == [2] * 7


def test_nobody_waits_for_the_first_replica():
    assert run([1], current=0) == [1]


def test_giving_back_waits_for_the_longest_need_and_goes_by_steps_with_pauses():
    sizes = run([6, 5] + [1] * 30, current=6)
    assert sizes[:11] == [6] * 11
    assert [sizes[i] for i in (11, 12, 14, 15, 18, 19)] == [5, 5, 5, 3, 3, 1]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=100), st.integers(0, 30))
def test_no_size_was_never_wanted_or_held(wanted, current):
    sizes = run(wanted, current)
    assert all(0 <= size <= max([current, *wanted]) for size in sizes)
    assert all(a - b <= CONFIG.downscale_step for a, b in zip([current, *sizes], sizes, strict=False))
