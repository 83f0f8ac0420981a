"""Keeps a line in the order in which the fewest of those that wait are late, by how fast the fleet is. Pure."""

from math import inf

from cluster.scheduler.fewest_late import Job, behind_others
from cluster.scheduler.index import PrefixIndex
from cluster.scheduler.pace import Pace
from cluster.scheduler.waiting_line import Waiting, WaitingLine
from core.messages.to_scheduler import Reserve

PAUSE_EACH_S = 5e-5  # for each request and replica that is looked at: some twenty times what that takes


class Triage:
    """Of one line. Each tenant has its part of the fleet, in which its own requests make each other late.

    Whom no plan could have served in time makes nobody go behind it, and goes behind others for its length alone, not
    for what it asks.
    """

    def __init__(self, line: WaitingLine, index: PrefixIndex) -> None:
        self._line = line
        self._index = index
        self._last_at = float("-inf")

    def is_due(self, num_replicas: int, now: float) -> bool:
        """Not at every event: the order counts for the next requests alone, and so soon nobody comes late."""
        num_waiting = len(self._line)
        return num_waiting > 1 and now - self._last_at >= PAUSE_EACH_S * (num_waiting + num_replicas)

    def put_off(self, pace: Pace, block_size: int, now: float) -> None:
        """Requests that a pool computes at a pace."""
        self._last_at = now
        for share, line in self._line.in_time():
            jobs = [self._job(one, pace, share, block_size) for one in line]
            for number in behind_others(jobs, now):
                self._line.put_off(line[number])

    def _job(self, waiting: Waiting, pace: Pace, share: float, block_size: int) -> Job:
        request = waiting.request
        if waiting.num_uncached is None:
            waiting.num_uncached = self._num_uncached(request, block_size)
        work_s = pace.work_s(waiting.num_uncached, request.num_tokens)
        first_token_s = pace.first_token_s(work_s)
        ends_by = waiting.due_at - pace.queue_s - first_token_s + work_s / share
        has_a_chance = waiting.since + first_token_s <= waiting.due_at
        return Job(ends_by if has_a_chance else inf, work_s / share, request.priority, request.attempt == 0)

    def _num_uncached(self, request: Reserve, block_size: int) -> int:
        segments = self._index.match(request.block_hashes[: (request.num_tokens - 1) // block_size]).segments
        return request.num_tokens - (segments[0].depth * block_size if segments else 0)
