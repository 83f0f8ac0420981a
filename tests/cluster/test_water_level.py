"""Service by weight, as a simulation of small steps sees it, too."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.water_level import WaterLevel

Works = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.5, 4)), min_size=1, max_size=6)


@given(Works, st.floats(0, 1))
def test_all_that_is_done_took_the_time_that_went_by(works, share):
    seconds = share * sum(work_s for work_s, _ in works)
    level = WaterLevel(works).after(seconds * (1 - 1e-9))
    assert sum(min(work_s, level * weight) for work_s, weight in works) == pytest.approx(seconds, rel=1e-6, abs=1e-9)


def test_who_wants_little_leaves_the_rest_to_others():
    level = WaterLevel([(10.0, 1.0), (1.0, 1.0), (1.0, 2.0)])
    assert level.after(2.0) == 0.5, "a quarter each of weight"
    assert level.after(3.0) == 1.0 and level.after(4.0) == 2.0, "the first alone, after three seconds"
    assert level.after(12.0) == float("inf")
