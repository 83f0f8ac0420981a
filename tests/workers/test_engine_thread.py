"""A rank that waits for work is not one that hangs."""

import asyncio
import queue
import threading

from worker.engine_thread import EngineThread


class FollowerRunner:
    """Stands in for a runner whose first rank launches when the test says so."""

    def __init__(self) -> None:
        self.launched: queue.Queue[str | None] = queue.Queue()
        self.may_end = threading.Event()

    def launches(self):
        while (batch := self.launched.get(timeout=10)) is not None:
            yield batch

    def execute_launched(self, batch) -> None:
        assert self.may_end.wait(10)


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_follower_is_busy_only_while_it_executes():
    engine, runner = EngineThread(None), FollowerRunner()
    engine.runner = runner
    following = asyncio.create_task(engine.follow())
    await asyncio.sleep(0.05)
    assert engine.busy_s == 0, "waiting for the first rank"
    runner.launched.put("batch")
    await until(lambda: engine.busy_s > 0.03)
    runner.may_end.set()
    await until(lambda: engine.num_steps == 1)
    assert engine.busy_s == 0
    runner.launched.put(None)
    await following
    engine.close(lambda: None)
