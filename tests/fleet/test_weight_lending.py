"""A rank that starts reads its weights from one that lives, and loses nothing when that one goes."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.config import TransferConfig
from core.errors import Incompatible, PeerError, StaleMessage, Unavailable
from core.messages.fleet import Role
from core.messages.to_lender import BorrowWeights, FillWindow, GiveBackWeights
from core.security import UNGUARDED
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.model_parameters import Share, list_parameters
from kv_transfer.channels.select import make_connectors
from rpc import methods
from rpc.client import RpcClient
from tests.checkpoints import make_checkpoint
from tests.fleet.in_process_fleet import BLOCK_SIZE, generate, running_fleet
from worker import weight_windows
from worker.rank_weights import RankWeights
from worker.weight_borrower import WeightBorrower
from worker.weight_lender import MAX_LOANS

CPU = torch.device("cpu")
WINDOW_BYTES = 2**17  # so that the small model takes several
TRANSFER = TransferConfig(weights_trial_mib=0.05, digest_share=1.0)
PROMPT = list(range(1, 40))


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    for module in ("weight_windows", "weight_borrower", "weight_lender"):
        monkeypatch.setattr(f"worker.{module}.WINDOW_BYTES", WINDOW_BYTES)
    monkeypatch.setattr(weight_windows, "_BLOCKS", WINDOW_BYTES // 2**12)
    monkeypatch.setattr(weight_windows, "_BLOCK_BYTES", 2**12)
    monkeypatch.setattr(weight_windows, "_LAYOUT", replace(weight_windows._LAYOUT, head_dim=2**10))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "qwen2")


class Borrowing:
    """A rank that starts, as far as its weights are concerned."""

    def __init__(self, fleet, checkpoint: Path, lender: str, transfer: TransferConfig, revision: str = "") -> None:
        spec = replace(fleet._spec_for("late", Role.DECODE), weight_lenders=(lender,), transfer=transfer)
        model = load_model_spec(checkpoint, "float32")
        layout = model.kv_layout(1, BLOCK_SIZE)
        self.client = RpcClient(UNGUARDED)
        weights = RankWeights(spec, "127.0.0.1:1", self.client, make_connectors)
        self.image, self.weights = weights._describe(model, layout)
        if revision:
            self.weights = replace(self.weights, weights_revision=revision)
        self.parameters = list_parameters(model, Share(0, layout))
        self.disk = CheckpointReader(checkpoint, model, CPU)
        self.borrower = WeightBorrower(
            asyncio.get_running_loop(),
            self.client,
            transfer,
            (lender,),
            lambda number, may_read: weights._windows(number, self.weights, may_read),
            self.image,
            self.weights,
            "float32",
            CPU,
        )

    async def read(self) -> list[torch.Tensor]:
        return await asyncio.to_thread(lambda: list(self.borrower.read(self.parameters)))

    async def close(self) -> None:
        await asyncio.to_thread(self.borrower.close)
        await self.client.close()


def lender_of(replica):
    return replica.rank._serving.weights._lender


@pytest.mark.parametrize("channel", ["shared_memory", "tcp", "gloo"])
async def test_every_byte_is_that_of_the_checkpoint_and_nothing_is_left(checkpoint, channel):
    transfer = TRANSFER.model_copy(update={"channel": channel})
    async with running_fleet(checkpoint, 0, 1, transfer=transfer) as fleet:
        lender = fleet.replicas["d0"]
        borrowing = Borrowing(fleet, checkpoint, lender.info.address, transfer)
        assert borrowing.image.num_bytes > 3 * WINDOW_BYTES
        try:
            came = await borrowing.read()
            assert len(lender_of(lender)) == 1
        finally:
            await borrowing.close()
        for parameter, ours, stored in zip(
            borrowing.parameters, came, borrowing.disk.read(borrowing.parameters), strict=True
        ):
            assert torch.equal(ours, stored), parameter.name
        assert len(lender_of(lender)) == 0 and lender_of(lender)._windows is None


async def test_a_replica_that_borrows_speaks_like_its_lender(checkpoint, caplog):
    caplog.set_level("INFO")
    async with running_fleet(checkpoint, 0, 1, transfer=TRANSFER) as fleet:
        expected = await generate(fleet, "first", PROMPT, 12)
        await fleet.add("d1", Role.DECODE, weight_lenders=(fleet.replicas["d0"].info.address,))
        assert "from peer" in caplog.text
        await fleet.stop("d0")
        await fleet.until_ready(1)
        assert await generate(fleet, "second", PROMPT, 12) == expected


async def test_a_lender_that_dies_on_the_way_costs_no_more_than_its_bytes(checkpoint):
    async with running_fleet(checkpoint, 0, 1, transfer=TRANSFER) as fleet:
        borrowing = Borrowing(fleet, checkpoint, fleet.replicas["d0"].info.address, TRANSFER)
        reading = borrowing.borrower.read(borrowing.parameters)
        first = await asyncio.to_thread(next, reading)
        assert torch.equal(first, next(borrowing.disk.read(borrowing.parameters)))
        await fleet.stop("d0")
        with pytest.raises(PeerError):
            await asyncio.to_thread(list, reading)
        await borrowing.close()


async def test_other_weights_are_refused_by_name(checkpoint):
    async with running_fleet(checkpoint, 0, 1, transfer=TRANSFER) as fleet:
        borrowing = Borrowing(fleet, checkpoint, fleet.replicas["d0"].info.address, TRANSFER, revision="other")
        with pytest.raises(Incompatible, match="weights_revision differs"):
            await borrowing.read()
        await borrowing.close()


async def test_loans_are_few_and_end_by_themselves(checkpoint):
    transfer = TRANSFER.model_copy(update={"data_timeout_s": 0.5})
    async with running_fleet(checkpoint, 0, 1, transfer=transfer) as fleet:
        replica = fleet.replicas["d0"]
        borrowing, address = Borrowing(fleet, checkpoint, replica.info.address, transfer), replica.info.address

        async def borrow(loan_id: str):
            wanted = BorrowWeights(loan_id, borrowing.weights)
            return await borrowing.client.call(address, methods.BORROW_WEIGHTS, wanted, 2.0)

        lent = [await borrow(f"loan{number}") for number in range(MAX_LOANS)]
        windows = [window for each in lent for window in each.windows]
        assert len({block for window in windows for block in window}) == sum(map(len, windows))
        assert await borrow("loan0") == lent[0]
        with pytest.raises(Unavailable, match="lent to 4 ranks"):
            await borrow("one too many")
        assert (await borrowing.client.call(address, methods.GIVE_BACK_WEIGHTS, GiveBackWeights("loan1"), 2.0)).known
        assert (await borrow("next")).windows == lent[1].windows
        async with asyncio.timeout(10):
            while len(lender_of(replica)):
                await asyncio.sleep(0.05)
        with pytest.raises(StaleMessage):
            await borrowing.client.call(address, methods.FILL_WINDOW, FillWindow("loan0", 0, 0, 10), 2.0)
        assert lender_of(replica)._windows is None
        await borrowing.close()
