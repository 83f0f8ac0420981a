"""From planned choices to an HTTP answer, streamed or whole; the endpoints differ only in the shape they give it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from cluster.ingress.choices import Choice, Delta, interleave, run_choice
from cluster.ingress.connection import until_disconnect
from cluster.ingress.errors import CLIENT_CLOSED_REQUEST, ClientDisconnected, at_the_edge
from cluster.ingress.generation import Backend
from cluster.ingress.metrics import Metrics
from cluster.ingress.protocol import GenerationRequest, StreamOptions
from cluster.ingress.request_scope import RequestRecord
from cluster.ingress.served_model import ServedModel
from cluster.ingress.sse import DONE, ChunkWriter, EventStream
from core.config import IngressConfig
from core.sampling import TokenLogprobs


@dataclass(frozen=True)
class Edge:
    """What every endpoint works with."""

    config: IngressConfig
    model: ServedModel
    backend: Backend
    metrics: Metrics

    async def served_model(self) -> ServedModel:
        """The model, its context no longer than the KV caches of the present fleet."""
        longest = (await self.backend.health()).max_model_len
        if longest is None or longest >= self.model.max_model_len:
            return self.model
        return replace(self.model, max_model_len=longest)


@dataclass
class Output:
    """All that one choice generated."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Appends what a delta brings."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason


class Shape(Protocol):
    """How an endpoint spells its answer."""

    def identity(self, streamed: bool) -> dict[str, Any]:
        """The fields that all chunks, or the whole answer, begin with."""
        ...

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The fields after the identity of each chunk that a delta makes, `choices` among them; none if empty."""
        ...

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The fields after the identity of the answer in one piece."""
        ...


class Usage:
    """Counts tokens over all choices; a prompt counts once however many choices it has."""

    def __init__(self, choices: Sequence[Choice], num_per_prompt: int) -> None:
        self._num_per_prompt = num_per_prompt
        self._num_prompt = sum(len(choice.generation.prompt_token_ids) for choice in choices[::num_per_prompt])
        self._num_output = 0
        self._num_cached = 0

    def add(self, delta: Delta) -> None:
        """Counts a delta; of a prompt's choices the first says what was cached."""
        self._num_output += len(delta.token_ids)
        if delta.index % self._num_per_prompt == 0:
            self._num_cached += delta.num_cached_tokens or 0

    def fields(self) -> dict[str, Any]:
        """OpenAI's usage object so far."""
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": self._num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
        }


class Explanation:
    """Where each choice ran and what took its time, when the request asks for it."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._reports: list[dict[str, Any]] = []

    def add(self, delta: Delta) -> None:
        """Keeps a choice's report; a choice that a stop string ended has none."""
        if delta.report is not None:
            self._reports.append({"index": delta.index} | asdict(delta.report))

    def fields(self) -> dict[str, Any]:
        """The `baton` object, or nothing."""
        return {"baton": self._reports} if self.wanted else {}


async def answer(
    edge: Edge, http: Request, request: GenerationRequest, choices: Sequence[Choice], shape: Shape
) -> Response:
    """Generates all choices and answers. Raises the BatonError of the first that fails before anything was sent."""
    record: RequestRecord = http.state.record
    streams = [run_choice(edge.backend, edge.model, choice, record.meter.choice()) for choice in choices]
    deltas = interleave(streams)
    usage, explanation = Usage(choices, request.num_choices), Explanation(request.baton.explain)
    timeout_s = edge.config.request_timeout_s
    if request.stream:
        frames = _frames(deltas, shape, usage, explanation, request.stream_options or StreamOptions())
        return EventStream(frames, timeout_s, record)
    try:
        content = await until_disconnect(http.receive, _collect(deltas, choices, shape, usage, explanation, timeout_s))
    except ClientDisconnected:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(content)


async def _collect(
    deltas: AsyncGenerator[Delta, None],
    choices: Sequence[Choice],
    shape: Shape,
    usage: Usage,
    explanation: Explanation,
    timeout_s: float,
) -> dict[str, Any]:
    outputs = [Output(choice.index) for choice in choices]
    try:
        async with aclosing(deltas), asyncio.timeout(timeout_s):
            async for delta in deltas:
                outputs[delta.index].add(delta)
                usage.add(delta)
                explanation.add(delta)
    except Exception as error:
        raise at_the_edge(error, timeout_s) from error
    return shape.identity(streamed=False) | shape.whole(outputs) | {"usage": usage.fields()} | explanation.fields()


async def _frames(
    deltas: AsyncGenerator[Delta, None], shape: Shape, usage: Usage, explanation: Explanation, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    writer = ChunkWriter(shape.identity(streamed=True))
    async with aclosing(deltas):
        async for delta in deltas:
            usage.add(delta)
            explanation.add(delta)
            chunks = shape.chunks(delta)
            if options.continuous_usage_stats:
                chunks = [chunk | {"usage": usage.fields()} for chunk in chunks]
            elif options.include_usage:
                chunks = [chunk | {"usage": None} for chunk in chunks]
            if chunks:
                yield b"".join(map(writer.write, chunks))
    if options.include_usage:
        yield writer.write({"choices": [], "usage": usage.fields()})
    if explanation.wanted:
        yield writer.write({"choices": []} | explanation.fields())
    yield DONE
