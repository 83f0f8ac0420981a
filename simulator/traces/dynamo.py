"""Dynamo's request traces: one event a line, with when a call came, its lengths, and the hashes of its blocks. Pure."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from simulator.traces.block_ids import NumTokens
from simulator.traces.trace import OWN_TOKENS, Run, TracedRequest, blocks, own_token, runs_of_blocks
from simulator.traces.turns import Turn, with_outputs

ENDED = "request_end"  # the one event that tells of a call of the model; the others are of tools


@dataclass(frozen=True, slots=True)
class Replay:
    """A prompt by its blocks, of which the last may be partial. Each hash stands for all that comes before, too."""

    trace_block_size: Annotated[int, Field(ge=1, le=65536)]
    input_length: NumTokens
    input_sequence_hashes: list[Annotated[int, Field(ge=0)]]


@dataclass(frozen=True, slots=True)
class Call:
    """Of the model."""

    request_id: Annotated[str, Field(min_length=1)]
    request_received_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    input_tokens: NumTokens
    output_tokens: Annotated[int, Field(ge=0)]
    cached_tokens: Annotated[int, Field(ge=0)] | None = None
    replay: Replay | None = None  # None: a prompt that has nothing in common with others


@dataclass(frozen=True, slots=True)
class Agent:
    """Whose call it is; a sub-agent has a session of its own."""

    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Of a call or a tool."""

    event_type: str
    agent_context: Agent | None = None
    request: Call | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """Guarded by pydantic where it is read; further fields are left out."""

    event: Event


def read_dynamo(lines: Iterable[Line]) -> list[TracedRequest]:
    """Calls as they were received, the first one at 0 s. Raises ValueError for too many different blocks, and
    where hashes and tokens do not agree."""
    ended = [line.event for line in lines if line.event.event_type == ENDED]
    calls = [(event.request, event.agent_context or Agent()) for event in ended if event.request is not None]
    calls.sort(key=lambda found: (found[0].request_received_ms, found[0].request_id))
    sessions: defaultdict[str, list[Turn]] = defaultdict(list)
    token_of: dict[int, int] = {}
    for number, (call, agent) in enumerate(calls):
        after_s = (call.request_received_ms - calls[0][0].request_received_ms) / 1000
        session = agent.session_id or call.request_id
        sessions[session].append(_turn(call, agent.session_id, after_s, own_token(number), token_of))
    return [request for turns in sessions.values() for request in with_outputs(turns)]


def _turn(call: Call, session: str, arrival_s: float, own: int, token_of: dict[int, int]) -> Turn:
    output = (Run(own, max(1, call.output_tokens)),)
    replay = call.replay
    if replay is None:
        prompt: tuple[Run, ...] = (Run(own, call.input_tokens),)
        return Turn(TracedRequest(call.request_id, arrival_s, prompt, output, session=session), prompt)
    ids = [token_of.setdefault(block_hash, len(token_of)) for block_hash in replay.input_sequence_hashes]
    if len(token_of) > OWN_TOKENS:
        raise ValueError(f"more than {OWN_TOKENS} different blocks")
    size, num_tokens = replay.trace_block_size, replay.input_length
    num_whole, num_hashes = num_tokens // size, len(replay.input_sequence_hashes)
    if not num_whole <= num_hashes <= -(-num_tokens // size):
        what = f"{num_hashes} input_sequence_hashes for {num_tokens} tokens in blocks of {size}"
        raise ValueError(f"call {call.request_id}: {what}")
    prompt = runs_of_blocks(blocks(ids, size), num_tokens, own)
    request = TracedRequest(call.request_id, arrival_s, prompt, output, session=session)
    return Turn(request, blocks(ids[:num_whole], size), call.cached_tokens)
