"""More or less of the same load: independent sessions, never copies of one stream. Pure.

Scaling by a factor draws that many times as many sessions, with replacement, each with a start of its own that is drawn
from when sessions started in the trace, and with tokens of its own but for what different sessions of the trace had in
common (system prompts). Gaps within a session stay.
"""

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from simulator.traces.trace import Run, TracedRequest

MOST_REQUESTS = 10_000_000
SPREAD = 0.02  # of the trace's duration: a drawn start lies that near to one of the trace, at most


def scale(trace: Sequence[TracedRequest], factor: float, seed: int) -> list[TracedRequest]:
    """A trace of the same duration with `factor` times the requests, about.

    Raises ValueError unless that is between one request and MOST_REQUESTS.
    """
    if not 0.5 <= len(trace) * factor <= MOST_REQUESTS:
        raise ValueError(f"{len(trace)} requests cannot be scaled to less than one, or more than {MOST_REQUESTS}")
    sessions = list(_sessions(trace).values())
    shared = _shared_tokens(sessions)
    random, duration_s = Random(seed), trace[-1].arrival_s
    starts = sorted(session[0].arrival_s for session in sessions)
    fresh = _FreshTokens(shared)
    drawn: list[TracedRequest] = []
    wanted = max(1, round(len(trace) * factor))
    while len(drawn) < wanted:
        session = random.choice(sessions)
        start_s = random.choice(starts) + (random.random() - 0.5) * SPREAD * duration_s
        shift_s = min(max(start_s, 0.0), duration_s) - session[0].arrival_s
        fresh.next_session(session)
        number = len(drawn)
        drawn += [
            replace(
                request,
                request_id=f"{request.request_id}.{number}",
                arrival_s=request.arrival_s + shift_s,
                prompt=fresh.of(request.prompt),
                output=fresh.of(request.output),
                session=f"{request.session}.{number}" if request.session else "",
            )
            for request in session
        ]
    # Who began late goes on beyond the trace's end, where nobody begins any more: that is another load.
    kept = [request for request in drawn if request.arrival_s <= duration_s]
    return sorted(kept, key=lambda request: (request.arrival_s, request.request_id))


def halves(trace: Sequence[TracedRequest]) -> tuple[list[TracedRequest], list[TracedRequest]]:
    """Before and after the middle of its duration, the second half beginning at 0 s."""
    middle_s = trace[-1].arrival_s / 2
    cut = bisect([request.arrival_s for request in trace], middle_s)
    second = [replace(request, arrival_s=request.arrival_s - middle_s) for request in trace[cut:]]
    return list(trace[:cut]), second


def _sessions(trace: Sequence[TracedRequest]) -> dict[str, list[TracedRequest]]:
    """Requests of no session are sessions of one."""
    found: defaultdict[str, list[TracedRequest]] = defaultdict(list)
    for request in trace:
        found[request.session or request.request_id].append(request)
    return found


def _shared_tokens(sessions: Sequence[Sequence[TracedRequest]]) -> set[int]:
    """Ids that several sessions have."""
    owner: dict[int, int] = {}
    shared: set[int] = set()
    for number, session in enumerate(sessions):
        for token in _tokens(session):
            if owner.setdefault(token, number) != number:
                shared.add(token)
    return shared


def _tokens(session: Sequence[TracedRequest]) -> set[int]:
    runs = {run for request in session for run in (*request.prompt, *request.output)}
    return {token for run in runs for token in range(run.first, run.first + run.number)}


class _FreshTokens:
    """Other ids for what belongs to one session: its own block of ids, in the same order."""

    def __init__(self, shared: set[int]) -> None:
        self._shared = shared
        self._next = max(shared, default=-1) + 1
        self._of_session: dict[int, int] = {}

    def next_session(self, session: Sequence[TracedRequest]) -> None:
        """What follows is of this one. Raises ValueError when there are no ids left."""
        own = sorted(_tokens(session) - self._shared)
        self._of_session = {token: self._next + place for place, token in enumerate(own)}
        self._next += len(own)
        if self._next > 2**31:
            raise ValueError("more different blocks than 31 bits can name")

    def of(self, runs: Sequence[Run]) -> tuple[Run, ...]:
        """The same runs with this session's ids."""
        return tuple(part for run in runs for part in self._fresh(run))

    def _fresh(self, run: Run) -> Iterator[Run]:
        """Ids that are neighbours and belong to the session stay neighbours."""
        first = run.first
        while first < run.first + run.number:
            last = first + 1
            while last < run.first + run.number and (last in self._shared) == (first in self._shared):
                last += 1
            yield Run(self._of_session.get(first, first), run.length, last - first)
            first = last
