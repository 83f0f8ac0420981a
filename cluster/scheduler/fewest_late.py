"""Which jobs go behind all others so that the fewest are late. Pure.

Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs" (Management Science, 1968):
jobs are taken in the order in which they are due; whenever the next one would be late, the longest of those that were
taken, itself included, goes behind.
"""

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import NamedTuple


class Job(NamedTuple):
    """What one machine does for `work_s` seconds; it is late unless that is over by `due_at`."""

    due_at: float
    work_s: float
    rank: int = 0  # those of higher ranks go first, also when they went behind others of theirs
    may_go_behind: bool = True
    for_others_s: float = 0.0  # beside its own work; stays where it was when the job goes behind


def behind_others(jobs: Iterable[Job], now: float) -> list[int]:
    """Positions of those that go behind; `jobs` are in the order of their ranks, the highest first, and due times."""
    found: list[int] = []
    taken: list[tuple[float, int]] = []  # a heap of the present rank, the longest first
    ends_at, behind_s, rank = now, 0.0, None
    for number, job in enumerate(jobs):
        if job.rank != rank:
            taken, rank = [], job.rank
            ends_at, behind_s = ends_at + behind_s, 0.0
        ends_at += job.work_s + job.for_others_s
        if job.may_go_behind:
            heappush(taken, (-job.work_s, number))
        if ends_at > job.due_at and taken:
            negative_s, longest = heappop(taken)
            ends_at += negative_s
            behind_s -= negative_s
            found.append(longest)
    return found
