"""Traces of agents: each session's prompts grow by what the model said and what its tools answered. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from random import Random
from typing import Any

from simulator.traces.trace import OWN_TOKENS, Run, TracedRequest, own_token, runs_of_blocks, split_at
from simulator.traces.turns import Turn, with_outputs

SESSIONS_RATE = 0.05  # session starts per second, Poisson; `scale` changes it
LONGEST_PAUSE_S = 600.0  # of a person away from an agent: longer ones are cut to this


def read_sessions(sessions: Iterable[Mapping[str, Any]], random: Random) -> Iterator[TracedRequest]:
    """Session starts are drawn. Tools and system prompt of equal lengths are taken to be equal, as those of a product.

    Where a prompt begins with all blocks of the one before, that one's output is what follows there. Raises ValueError
    for an id that two sessions have, or two agents of one.
    """
    start_s, tokens, names = 0.0, _Tokens(), set[str]()
    for session in sessions:
        if (name := str(session["id"])) in names:
            raise ValueError(f"session id {name!r} is used twice")
        names.add(name)
        yield from _read_session(session, start_s, tokens)
        start_s += random.expovariate(SESSIONS_RATE)


class _Tokens:
    """Token ids of blocks that sessions share, of blocks of one session, of requests."""

    def __init__(self) -> None:
        self._shared: dict[tuple[int, int], int] = {}
        self._next = 0
        self._num_requests = 0

    def reserve(self, number: int) -> int:
        """The first of so many ids that nobody has yet."""
        self._next += number
        if self._next >= OWN_TOKENS:
            raise ValueError(f"more than {OWN_TOKENS} different blocks")
        return self._next - number

    def shared(self, lengths: tuple[int, int], number: int) -> int:
        """The first id of the blocks of tools and system prompts of these lengths."""
        if lengths not in self._shared:
            self._shared[lengths] = self.reserve(number)
        return self._shared[lengths]

    def own(self) -> int:
        """Of the next request."""
        self._num_requests += 1
        return own_token(self._num_requests - 1)


def _read_session(session: Mapping[str, Any], start_s: float, tokens: _Tokens) -> Iterator[TracedRequest]:
    name, block_size = session["id"], session["block_size"]
    base = tokens.reserve(1 + _highest_block(session))
    agents = {"main": [r for r in session["requests"] if "requests" not in r]}
    begun = {"main": 0.0}
    prefixes = {"main": session}
    for entry in session["requests"]:
        if "requests" in entry:
            if entry["agent_id"] in agents:
                raise ValueError(f"session {name!r} has two agents of the id {entry['agent_id']!r}")
            agents[entry["agent_id"]], begun[entry["agent_id"]] = entry["requests"], entry["t"]
            prefixes[entry["agent_id"]] = entry
    cut = _Pauses([r["t"] for r in session["requests"]])
    for agent, requests in agents.items():
        turns: list[Turn] = []
        for asked in requests:
            ids = _blocks(asked, base, prefixes[agent], block_size, tokens)
            prompt = runs_of_blocks(ids, max(1, asked["in"]), own := tokens.own())
            arrival_s = start_s + cut.at(begun[agent] + asked["t"])
            output = (Run(own, max(1, asked["out"])),)
            request_id = f"{name}-{agent}-{len(turns)}"
            request = TracedRequest(request_id, arrival_s, prompt, output, session=f"{name}-{agent}")
            turns.append(Turn(request, ids))
        yield from with_outputs(turns)


def _highest_block(session: Mapping[str, Any]) -> int:
    entries = [r for entry in session["requests"] for r in entry.get("requests", (entry,))]
    return max((first + count for entry in entries for first, count in entry["hash_runs"]), default=0)


def _blocks(
    request: Mapping[str, Any], base: int, prefix: Mapping[str, Any], block_size: int, tokens: _Tokens
) -> tuple[Run, ...]:
    """A prompt's blocks: those of the prefix that sessions share, then the session's, whose ids begin at `base`."""
    lengths = prefix["tool_tokens"], prefix["system_tokens"]
    num_shared = sum(lengths) // block_size
    own = [Run(base + first, block_size, count) for first, count in request["hash_runs"]]
    num_shared = min(num_shared, sum(run.number for run in own))
    _, rest = split_at(own, num_shared * block_size)
    shared = (Run(tokens.shared(lengths, num_shared), block_size, num_shared),) if num_shared else ()
    return (*shared, *rest)


class _Pauses:
    """Times of a session with its long pauses cut."""

    def __init__(self, times: Sequence[float]) -> None:
        self._cuts: list[tuple[float, float]] = []  # (from this time on, so much earlier)
        cut = 0.0
        for before, after in pairwise(sorted(times)):
            if after - before > LONGEST_PAUSE_S:
                cut += after - before - LONGEST_PAUSE_S
                self._cuts.append((after, cut))

    def at(self, time_s: float) -> float:
        """Where a time lies after the cuts."""
        return time_s - max((cut for since, cut in self._cuts if since <= time_s), default=0.0)
