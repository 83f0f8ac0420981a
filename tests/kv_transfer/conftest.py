"""A fleet of transfer agents for each transport of a machine without GPUs."""

import threading

import pytest_asyncio
from transfer_fleet import Fleet


@pytest_asyncio.fixture(params=["in_process", "strict", "gloo", "tcp", "shared_memory"])
async def fleet(request, tmp_path):
    fleet = Fleet(request.param, folder=tmp_path)
    yield fleet
    await fleet.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("channel")] == []
