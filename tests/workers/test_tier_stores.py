"""Blocks pass between the device's pool, host memory and disk byte for byte."""

import asyncio

import pytest
import torch

from core.config import TiersConfig
from core.errors import ConfigurationError, TransferFailed
from core.kv_layout import KVLayout
from core.messages.to_rank import TierMove
from worker.tier_stores import TierStores, tier_sizes

LAYOUT = KVLayout(3, 2, 8, 4, "bfloat16", 1)
BLOCK_MIB = LAYOUT.block_bytes_per_rank / 2**20
DEVICE, HOST, DISK = range(3)


def make(tmp_path, num_host: int = 4, num_disk: int = 4):
    config = TiersConfig(host_mib=num_host * BLOCK_MIB, disk_mib=num_disk * BLOCK_MIB, disk_dir=str(tmp_path))
    pool = torch.randn(3, 8, 2, 2, 4, 8).bfloat16()
    return pool, TierStores(pool, config, tier_sizes(LAYOUT, config))


def test_blocks_go_down_to_disk_and_come_back_to_other_places(tmp_path):
    pool, stores = make(tmp_path)
    original = pool.clone()

    async def story() -> None:
        await stores.move(TierMove(DEVICE, HOST, (1, 5), (3, 0)))
        await stores.move(TierMove(HOST, DISK, (0, 3), (2, 1)))  # host slots: 3 holds block 1, 0 holds block 5
        pool.zero_()
        await stores.move(TierMove(DISK, DEVICE, (2, 1), (7, 6)))
        await stores.move(TierMove(HOST, DEVICE, (3,), (0,)))

    asyncio.run(story())
    stores.close()
    assert pool[:, 7].equal(original[:, 5])
    assert pool[:, 6].equal(original[:, 1])
    assert pool[:, 0].equal(original[:, 1])
    assert not pool[:, 1:6].any()


def test_nothing_stays_on_disk(tmp_path):
    _, stores = make(tmp_path)
    assert list(tmp_path.iterdir()) == []
    stores.close()


def test_a_disk_that_fails_says_so(tmp_path):
    _, stores = make(tmp_path)
    stores._stores[DISK]._file.close()
    with pytest.raises((TransferFailed, ValueError)):
        asyncio.run(stores.move(TierMove(HOST, DISK, (0,), (0,))))


def test_a_tier_needs_room_for_a_block_and_a_folder(tmp_path):
    with pytest.raises(ConfigurationError, match=r"tiers.host_mib 0.0001 holds no block of 768 bytes"):
        tier_sizes(LAYOUT, TiersConfig(host_mib=0.0001))
    with pytest.raises(ConfigurationError, match="disk_dir"):
        make(tmp_path / "absent")
    with pytest.raises(ValueError, match="disk_mib needs a disk_dir"):
        TiersConfig(disk_mib=1)
