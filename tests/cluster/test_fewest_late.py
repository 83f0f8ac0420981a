"""Moore's rule against every other choice of jobs that go behind."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from cluster.scheduler.fewest_late import Job, behind_others


def num_late(jobs: list[Job], behind: set[int]) -> int:
    """Those that go behind are late; of the others, in their order, whoever ends after it is due."""
    ends_at, late = 0.0, len(behind)
    for number, job in enumerate(jobs):
        if number not in behind:
            ends_at += job.work_s
            late += ends_at > job.due_at
    return late


def all_choices(numbers: list[int]):
    return (set(some) for size in range(len(numbers) + 1) for some in combinations(numbers, size))


Jobs = st.lists(
    st.builds(
        Job, st.integers(1, 30).map(float), st.integers(1, 12).map(float), st.just(0), st.just(True), st.just(0.0)
    ),
    max_size=8,
)


@given(Jobs)
def test_no_choice_makes_fewer_late(jobs):
    jobs.sort()
    chosen = set(behind_others(jobs, 0.0))
    assert num_late(jobs, chosen) == len(chosen), "nobody else is late"
    assert len(chosen) == min(num_late(jobs, behind) for behind in all_choices(list(range(len(jobs)))))


@given(
    st.lists(
        st.builds(
            Job,
            st.integers(1, 30).map(float),
            st.integers(1, 12).map(float),
            st.integers(0, 2),
            st.just(True),
            st.just(0.0),
        ),
        max_size=9,
    )
)
def test_nobody_goes_behind_one_of_a_lower_rank(jobs):
    """What a rank loses does not depend on those that follow."""
    jobs.sort(key=lambda job: (-job.rank, job.due_at))
    chosen = behind_others(jobs, 0.0)
    for rank in range(3):
        above = [job for job in jobs if job.rank >= rank]
        assert behind_others(above, 0.0) == [number for number in chosen if number < len(above)]


@given(
    st.lists(st.builds(Job, st.floats(1, 30), st.floats(1, 12), st.just(0), st.booleans(), st.just(0.0)), max_size=9)
)
def test_who_may_not_go_behind_does_not(jobs):
    chosen = behind_others(sorted(jobs), 0.0)
    assert all(sorted(jobs)[number].may_go_behind for number in chosen)


def test_who_went_behind_still_goes_before_lower_ranks():
    assert behind_others([Job(1.0, 10.0, 1), Job(12.0, 3.0, 0), Job(12.0, 1.0, 0)], 0.0) == [0, 1]


def test_the_longest_goes_behind_when_three_short_ones_would_be_late():
    jobs = [Job(11.0, 10.0), Job(12.0, 2.0), Job(13.0, 2.0), Job(14.0, 2.0)]
    assert behind_others(jobs, 0.0) == [0]
    assert behind_others(jobs, 10.0) == [0, 1], "later, two of the three can still be in time"


def test_what_others_need_too_stays_where_it_was():
    """Of three that share 6 s and need 1 s each the first has the common part; the longest of its own goes behind."""
    jobs = [Job(8.0, 1.0, for_others_s=6.0), Job(8.5, 1.0), Job(11.0, 3.0), Job(11.5, 1.0)]
    assert behind_others(jobs, 0.0) == [2]
