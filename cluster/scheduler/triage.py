"""Puts off those of a line who would make others late, so that few are, by how fast the fleet is. Pure.

What several that wait have in common and nobody has cached counts for the first of them alone.
"""

from functools import partial
from math import inf
from typing import NamedTuple

from cluster.scheduler.fewest_late import Job, behind_others
from cluster.scheduler.index import PrefixIndex
from cluster.scheduler.pace import Pace
from cluster.scheduler.rules import usable_hashes
from cluster.scheduler.shared_work import Left, Prompt, left_by_line
from cluster.scheduler.waiting_line import Waiting, WaitingLine
from cluster.scheduler.water_level import WaterLevel

PAUSE_EACH_S = 5e-5  # for each request and replica that is looked at: several times what that takes
LOOK_UP_EACH_S = 2.0  # what is cached of a prompt changes while it waits
MOST_LOOK_UPS = 32  # at a time, of those that were looked up before


class Triage:
    """Of one line. What a tenant's own requests leave each other is its part of the fleet, which is by weight, and more
    when others want less.
    """

    def __init__(self, line: WaitingLine, index: PrefixIndex) -> None:
        self._line = line
        self._index = index
        self._last_at = -inf
        self._num_look_ups = 0  # in this round

    def is_due(self, num_replicas: int, now: float) -> bool:
        """Not at every event: the order counts for the next requests alone, and so soon nobody comes late."""
        num_waiting = len(self._line)
        return num_waiting > 1 and now - self._last_at >= PAUSE_EACH_S * (num_waiting + num_replicas)

    def put_off(self, pace: Pace, block_size: int, now: float) -> None:
        """Requests that a pool computes at a pace."""
        self._last_at = now
        self._num_look_ups = 0
        by_weight = self._line.by_weight()
        prompts = [self._prompt(one, block_size, now) for _, line in by_weight for one in line]
        works = map(partial(_Work.of, pace), prompts, left_by_line(prompts, block_size))
        lines = [(weight, [(one, next(works)) for one in line]) for weight, line in by_weight]
        level = WaterLevel((sum(work.all_s for _, work in line), weight) for weight, line in lines)
        for weight, line in lines:
            judged, jobs = [], []
            for waiting, work in line:
                if not waiting.is_put_off:
                    judged.append(waiting)
                    jobs.append(_job(waiting, work, pace, weight, level, now))
            self._line.put_off([judged[number] for number in behind_others(jobs, 0.0)])

    def _prompt(self, waiting: Waiting, block_size: int, now: float) -> Prompt:
        request = waiting.request
        is_new = waiting.looked_up_at == -inf
        if is_new or (now - waiting.looked_up_at >= LOOK_UP_EACH_S and self._num_look_ups < MOST_LOOK_UPS):
            waiting.looked_up_at = now
            self._num_look_ups += not is_new
            segments = self._index.match(usable_hashes(request, block_size)).segments
            waiting.num_cached_blocks = segments[0].depth if segments else 0
        return Prompt(request.block_hashes, request.num_tokens, waiting.num_cached_blocks)


class _Work(NamedTuple):
    """Seconds of a pool, of what is left of one prompt; see Left."""

    own_s: float
    all_s: float

    @classmethod
    def of(cls, pace: Pace, prompt: Prompt, left: Left) -> "_Work":
        """What is left of the prompt."""
        own_s = pace.work_s(left.num_own, prompt.num_tokens)
        if not left.num_for_others:
            return cls(own_s, own_s)
        return cls(own_s, pace.work_s(left.num_own + left.num_for_others, prompt.num_tokens))


def _job(waiting: Waiting, work: _Work, pace: Pace, weight: float, level: WaterLevel, now: float) -> Job:
    """In seconds of its tenant's own work.

    Whom no plan could have served in time makes nobody go behind it, and goes behind others for its length alone, not
    for what it asks. Nor does one that cannot be put off and is late whoever goes before it.
    """
    first_token_s = pace.first_token_s(work.all_s)
    begins_within_s = waiting.due_at - pace.begins_s - first_token_s - now
    in_vain = waiting.since + first_token_s > waiting.due_at or (begins_within_s < 0 and not waiting.may_be_put_off)
    due_s = inf if in_vain else weight * level.after(max(0.0, begins_within_s)) + min(0.0, begins_within_s) + work.all_s
    return Job(due_s, work.own_s, waiting.request.priority, waiting.may_be_put_off, work.all_s - work.own_s)
