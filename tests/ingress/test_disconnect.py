"""A client that leaves ends its generations at once; one that reads slowly bounds them."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from cluster.ingress.generation import Generation, GenerationEvent
from cluster.ingress.metrics import Metrics
from cluster.ingress.request_scope import RequestScope
from tests.ingress.scripted import Server


async def one_token_then_silence(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
    yield GenerationEvent((5,))
    await asyncio.Event().wait()


async def silence(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
    await asyncio.Event().wait()
    yield GenerationEvent(())


def status_count(server: Server, status: str) -> float:
    return server.metric(f'baton_requests_total{{endpoint="/v1/completions",status="{status}"}}')


@pytest.mark.parametrize("n", [1, 2])
def test_leaving_a_stream_closes_every_generation(server: Server, n: int):
    server.backend.script = one_token_then_silence
    before = status_count(server, "499")
    body = {"model": "tiny", "prompt": "x", "stream": True, "n": n}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        assert server.backend.closed_early == []
    assert server.backend.closed.wait(5)
    server.wait_until(lambda: status_count(server, "499") == before + 1)
    assert len(server.backend.closed_early) == len(server.backend.seen) == n


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_token_closes_the_generation(server: Server, stream: bool):
    server.backend.script = silence
    before = status_count(server, "499")
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": stream}).encode()
    with socket.create_connection(server.address) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.wait_until(lambda: len(server.backend.seen) == 1)
    assert server.backend.closed.wait(5)
    server.wait_until(lambda: status_count(server, "499") == before + 1)


async def test_a_request_whose_task_is_cancelled_counts_as_left_by_its_client():
    """Serve tells of a client that left by cancelling the task, in place of the ASGI message."""
    metrics, entered = Metrics(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        await asyncio.Event().wait()

    async def never(message: object = None) -> Message:
        raise AssertionError

    scope = {"type": "http", "path": "/v1/completions", "headers": []}
    task = asyncio.create_task(RequestScope(app, metrics)(scope, never, never))
    await entered.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert b'baton_requests_total{endpoint="/v1/completions",status="499"} 1.0' in metrics.exposition()


def test_a_client_that_does_not_read_is_not_generated_for_without_bound(server: Server):
    """Socket buffers and the server's write buffer hold a few megabytes; then the generator rests."""
    made = 0

    async def endless(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        nonlocal made
        while True:
            made += 1
            yield GenerationEvent((5,) * 1000)
            await asyncio.sleep(0)

    server.backend.script = endless
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True, "return_token_ids": True}).encode()
    with socket.create_connection(server.address) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.wait_until_resting(lambda: made)
        assert 0 < made < 20_000
    assert server.backend.closed.wait(5)
