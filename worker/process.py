"""A rank as a plain process, without Ray: reads its spec, serves, drains on SIGTERM or on request, ends.

The spec is a JSON file (see worker.spec.RankSpec). When the rank serves, the first line on standard output is the
replica's ReplicaInfo as JSON.
"""

import asyncio
import signal
import sys
from pathlib import Path

from pydantic import TypeAdapter

from core.messages.fleet import ReplicaInfo
from core.telemetry import configure_logging
from kv_transfer.channels.select import Connect, make_connectors
from worker.rank import MakeRole, Rank
from worker.spec import RankSpec


def main(make_role: MakeRole, connect: Connect = make_connectors) -> None:
    """Runs until the rank fails (exit status 1) or SIGTERM, SIGINT or a Drain request has drained it (0)."""
    configure_logging(None)
    asyncio.run(run(read_spec(), make_role, connect))


def read_spec() -> RankSpec:
    """The first argument's content."""
    return TypeAdapter(RankSpec).validate_json(Path(sys.argv[1]).read_bytes())


async def run(spec: RankSpec, make_role: MakeRole, connect: Connect = make_connectors) -> None:
    """One rank's life in this event loop; `connect` as for Rank."""
    rank = Rank(spec, make_role, connect)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        info = await rank.start()
        print(TypeAdapter(ReplicaInfo).dump_json(info).decode(), flush=True)
        serving, drained = asyncio.create_task(rank.run()), asyncio.create_task(rank.until_drained())
        told = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, drained, told}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()  # raises, unless the first rank has closed and this one follows
        else:
            await rank.drain(spec.pool.drain_timeout_s)
        for task in (serving, drained, told):
            task.cancel()
    finally:
        await rank.close()
