"""The weights of one rank: where it reads them, and lending them to ranks that start later."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from core.kv_layout import Compatibility, KVLayout
from engine.checkpoint_reader import CheckpointReader
from engine.model_parameters import Share, list_parameters
from engine.model_spec import ModelSpec
from engine.parameters import ReadParameters, fingerprint
from engine.weights import ModelWeights
from kv_transfer.channels.select import Connect
from kv_transfer.outbound import MayRead
from rpc import methods
from rpc.client import RpcClient
from rpc.server import RpcServer
from worker.spec import RankSpec
from worker.weight_borrower import WeightBorrower
from worker.weight_image import StoredImage, WeightImage
from worker.weight_lender import WeightLender
from worker.weight_progress import reporting
from worker.weight_sources import WeightSources
from worker.weight_windows import WeightWindows, window_memory

logger = logging.getLogger(__name__)


class RankWeights:
    """`reading` is for the engine's thread, everything else for the event loop."""

    def __init__(self, spec: RankSpec, address: str, client: RpcClient, connect: Connect) -> None:
        self._spec = spec
        self._address = address
        self._client = client
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._device = torch.device(spec.pool.device)
        self._lender: WeightLender | None = None

    @contextmanager
    def reading(self, model: ModelSpec, layout: KVLayout) -> Iterator[ReadParameters]:
        """Reads from disk, and from a lender where that is faster."""
        spec, disk = self._spec, CheckpointReader(Path(self._spec.model.path), model, self._device)
        image, weights = self._described = self._describe(model, layout)
        if not spec.weight_lenders or spec.transfer.weights_from == "disk":
            yield reporting(disk.read, model.dtype)
            return
        borrower = WeightBorrower(
            loop=self._loop,
            client=self._client,
            config=spec.transfer,
            lenders=spec.weight_lenders,
            make_windows=lambda number, may_read: self._windows(number, weights, may_read),
            image=image,
            weights=weights,
            dtype=model.dtype,
            device=self._device,
        )
        stretch_bytes = int(spec.transfer.weights_trial_mib * 2**20)
        sources = WeightSources(disk.read, borrower.read, model.dtype, stretch_bytes, time.monotonic)
        try:
            yield reporting(sources.read, model.dtype)
        finally:
            borrower.close()
        logger.info("weights came from: %s", sources.summary())

    def lend(self, loaded: ModelWeights, server: RpcServer) -> None:
        """Binds the calls by which others borrow what was read."""
        image, weights = self._described
        lender = self._lender = WeightLender(
            weights,
            StoredImage(image, loaded.parameters),
            lambda number, may_read: self._windows(number, weights, may_read),
            3 * self._spec.transfer.data_timeout_s,
        )
        calls = methods.WEIGHT_CALLS
        server.unary(methods.BORROW_WEIGHTS, lender.lend)
        server.unary(methods.FILL_WINDOW, lender.fill)
        server.unary(methods.GIVE_BACK_WEIGHTS, lender.give_back)
        server.unary(calls.connect, lambda message: lender.agent.on_connect(message))
        server.unary(calls.ready, lambda message: lender.agent.on_ready(message))
        server.unary(calls.digest, lambda message: lender.agent.on_digest(message))
        server.unary(calls.close, lambda message: lender.agent.on_close(message))

    async def close(self) -> None:
        """Ends what is lent."""
        if self._lender is not None:
            await self._lender.close()

    def _describe(self, model: ModelSpec, layout: KVLayout) -> tuple[WeightImage, Compatibility]:
        """Equal compatibility means equal images of equal bytes."""
        parameters = list_parameters(model, Share(self._spec.rank, layout, self._spec.pool.whole_experts))
        image = f"rank {self._spec.rank} of {layout.num_ranks}, {fingerprint(parameters)}"
        return WeightImage(parameters, model.dtype), Compatibility(
            self._spec.model.served_name, model.revision, model.dtype, 1, image
        )

    async def _windows(self, num_windows: int, weights: Compatibility, may_read: MayRead) -> WeightWindows:
        return WeightWindows(
            await asyncio.to_thread(window_memory, num_windows, self._device),
            spec=self._spec,
            address=self._address,
            weights=weights,
            client=self._client,
            connect=self._connect,
            may_read=may_read,
        )
