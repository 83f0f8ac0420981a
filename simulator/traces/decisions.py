"""The load that a global scheduler recorded (cluster/decision_record.py), to be played on another fleet. Pure.

A record has no tokens: a prompt is known by its block hashes, and each of them stands for a token of its own. Answers
are known by their length alone, so that a prompt which goes on with one has that part in common with later ones only.
"""

from collections.abc import Iterable

from core.messages.to_scheduler import Deregister, Finish, Plan, Progress, Report, Reserve
from simulator.traces.trace import OWN_TOKENS, Run, TracedRequest, blocks, own_token, runs_of_blocks

Event = Report | Deregister | Reserve | Plan | Progress | Finish


class RecordedLoad:
    """Requests as they were asked for the first time; those planned anew are none of their own."""

    def __init__(self) -> None:
        self._asked: list[tuple[float, Reserve]] = []
        self._num_output: dict[int, int] = {}  # by number of the request
        self._open: dict[str, int] = {}  # request id -> its number, until an attempt of it ends
        self._last: dict[str, int] = {}
        self._block_size = 0

    def take(self, at_s: float, event: Event) -> None:
        """The next event of a record."""
        match event:
            case Report():
                self._block_size = event.info.compatibility.block_size
            case Reserve(attempt=0) if event.request_id not in self._open:
                self._open[event.request_id] = self._last[event.request_id] = len(self._asked)
                self._asked.append((at_s, event))
            case Finish():
                self._open.pop(event.request_id, None)
                number = self._last.get(event.request_id)
                if number is not None and event.num_output_tokens is not None:
                    self._num_output[number] = event.num_output_tokens
            case _:
                pass

    def requests(self) -> list[TracedRequest]:
        """By arrival, the first one at 0 s. Raises ValueError when no report tells how many tokens a block has."""
        if not self._asked:
            return []
        if not self._block_size:
            raise ValueError("no report tells the size of a block")
        first_s, token_of = self._asked[0][0], dict[bytes, int]()
        return [self._traced(number, at_s - first_s, token_of) for number, (at_s, _) in enumerate(self._asked)]

    def _traced(self, number: int, arrival_s: float, token_of: dict[bytes, int]) -> TracedRequest:
        asked, own = self._asked[number][1], own_token(number)
        ids = [token_of.setdefault(block_hash, len(token_of)) for block_hash in asked.block_hashes]
        if len(token_of) > OWN_TOKENS:
            raise ValueError("more different blocks than 29 bits can name")
        prompt = runs_of_blocks(blocks(ids, self._block_size), asked.num_tokens, own)
        output = (Run(own, max(1, self._num_output.get(number, asked.max_new_tokens))),)
        return TracedRequest(f"decisions-{number}", arrival_s, prompt, output, asked.tenant)


def read_decisions(events: Iterable[tuple[float, Event]]) -> list[TracedRequest]:
    """Of all events of a record. Raises ValueError."""
    load = RecordedLoad()
    for at_s, event in events:
        load.take(at_s, event)
    return load.requests()
