"""Token events reach an ingress that is there, or soon back; those of one that never returns do not pile up."""

import asyncio
from contextlib import aclosing

from core.messages.to_decode import TokenEvent, TokensFrom
from decode_worker.outbox import Outbox


def event(index: int) -> TokenEvent:
    return TokenEvent("r", 0, index, (index,))


async def test_events_wait_for_a_stream_and_come_in_one_frame():
    outbox = Outbox(keep_s=5)
    outbox.put("i", event(0), 0.0)
    outbox.put("i", event(1), 0.1)
    async with aclosing(outbox.stream(TokensFrom("i"))) as frames:
        assert (await anext(frames)).events == (), "the first frame tells that the stream is attached"
        assert (await anext(frames)).events == (event(0), event(1))
        outbox.put("i", event(2), 0.2)
        assert (await anext(frames)).events == (event(2),)
    outbox.put("i", event(3), 1.0)
    async with aclosing(outbox.stream(TokensFrom("i"))) as frames:
        await anext(frames)
        assert (await anext(frames)).events == (event(3),)


async def test_events_of_an_ingress_that_never_returns_are_dropped():
    outbox = Outbox(keep_s=5)
    outbox.put("gone", event(0), 0.0)
    outbox.put("here", event(0), 3.0)
    outbox.forget_absent(5.0)
    assert set(outbox._pending) == set(outbox._waiting_since) == {"here"}


async def test_a_newer_stream_of_the_same_ingress_ends_the_older():
    outbox = Outbox(keep_s=5)
    older = outbox.stream(TokensFrom("i"))
    await anext(older)
    waiting = asyncio.create_task(anext(older, None))
    await asyncio.sleep(0)
    async with aclosing(outbox.stream(TokensFrom("i"))) as newer:
        await anext(newer)
        outbox.put("i", event(0), 0.0)
        assert (await anext(newer)).events == (event(0),)
        assert await asyncio.wait_for(waiting, 5) is None


async def test_events_that_a_broken_stream_did_not_take_are_dropped_too():
    outbox = Outbox(keep_s=5)
    async with aclosing(outbox.stream(TokensFrom("i"))) as frames:
        await anext(frames)
        outbox.put("i", event(0), 0.0)
    outbox.forget_absent(1.0)
    assert outbox._pending
    outbox.forget_absent(6.0)
    assert not outbox._pending and not outbox._waiting_since
