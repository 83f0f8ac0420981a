"""What tests of transfer agents have a fleet fetch, and how they hold it up."""

import asyncio

from transfer_fleet import Fleet, random_pairs

PAIRS = random_pairs(10, 24, 3)
SOURCES, DESTINATIONS = ([s for s, _ in PAIRS], [d for _, d in PAIRS])


async def fetch_all(fleet: Fleet, source: str, destination: str, pairs=PAIRS) -> int:
    ranks = range(fleet.layouts[destination].tensor_parallel)
    orders = [fleet.order(source, destination, rank, pairs) for rank in ranks]
    done = await asyncio.gather(*(fleet.agent(f"{destination}/{r}").fetch(orders[r]) for r in ranks))
    return sum(fetched.num_bytes for fetched in done)


def hold_ready(fleet: Fleet) -> tuple[asyncio.Event, asyncio.Event]:
    """Ready calls set `arrived` and wait for `release` before they reach the sender."""
    arrived, release = asyncio.Event(), asyncio.Event()
    deliver = fleet.control.ready

    async def ready(address, message):
        arrived.set()
        await release.wait()
        return await deliver(address, message)

    fleet.control.ready = ready
    return arrived, release
