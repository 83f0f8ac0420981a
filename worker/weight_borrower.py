"""Reads a starting rank's weights from a rank of another replica that has them."""

import asyncio
import secrets
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.config import TransferConfig
from core.errors import BatonError, PeerLost
from core.kv_layout import Compatibility
from core.messages.fleet import Empty
from core.messages.to_lender import BorrowWeights, FillWindow, GiveBackWeights, LentWeights
from core.messages.to_rank import SlabHeader
from engine.parameters import Parameter
from engine.weights import TORCH_DTYPES
from rpc import methods
from rpc.client import RpcClient
from worker.weight_image import WeightImage, bytes_of
from worker.weight_windows import WINDOW_BYTES, MakeWindows, WeightWindows, fetch_order

Result = TypeVar("Result")


class WeightBorrower:
    """`read` and `close` block and are for another thread than the event loop's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        client: RpcClient,
        config: TransferConfig,
        lenders: Sequence[str],
        make_windows: MakeWindows,
        image: WeightImage,
        weights: Compatibility,
        dtype: str,
        device: torch.device,
    ) -> None:
        """`lenders`: host:port of ranks that may have these weights, tried in turn."""
        self._loop = loop
        self._client = client
        self._config = config
        self._lenders = lenders
        self._make_windows = make_windows
        self._image = image
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._loan_id = f"weights-{secrets.token_hex(16)}"
        self._lender = ""
        self._lent: LentWeights | None = None
        self._windows: WeightWindows | None = None
        self._filling: asyncio.Task[Empty] | None = None

    def read(self, parameters: Sequence[Parameter]) -> Iterator[Tensor]:
        """Neighbouring parameters. Raises BatonError when nobody lends, or the lender is lost on the way."""
        first, last = self._image.place(parameters)
        runs = self._runs(first, last)
        run = torch.empty(0, dtype=torch.uint8, device=self._device)
        for parameter in parameters:
            dtype = TORCH_DTYPES[parameter.dtype or self._dtype]
            tensor = torch.empty(parameter.shape, dtype=dtype, device=self._device)
            rest = bytes_of(tensor)
            while len(rest):
                if not len(run):
                    run = next(runs)
                length = min(len(run), len(rest))
                rest[:length] = run[:length]
                run, rest = run[length:], rest[length:]
            yield tensor

    def close(self) -> None:
        """Gives the weights back."""
        self._submit(self._close()).result()

    # ---- the reader's thread ------------------------------------------------------------------------------------

    def _runs(self, first: int, last: int) -> Iterator[Tensor]:
        """The image's bytes in windows: the next one comes while the present one is read, and a third is filled."""
        starts = range(first, last, WINDOW_BYTES)
        coming = self._submit(self._bring(starts[0], last, 0))
        for number, start in enumerate(starts):
            coming.result()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # the window that comes next was read
            if number + 1 < len(starts):
                coming = self._submit(self._bring(starts[number + 1], last, number + 1))
            assert self._windows is not None
            yield self._windows.memory(number % 2)[: min(WINDOW_BYTES, last - start)]

    def _submit(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Work that has deadlines of its own."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # ---- the event loop -----------------------------------------------------------------------------------------

    async def _bring(self, start: int, last: int, number: int) -> None:
        """The window that begins at byte `start` of the image, into one of ours. Raises BatonError."""
        if self._lent is None:
            await self._borrow()
        assert self._lent is not None and self._windows is not None
        if self._filling is None:
            self._filling = self._fill(start, last, number)
        await self._filling
        following = start + WINDOW_BYTES
        self._filling = self._fill(following, last, number + 1) if following < last else None
        order = fetch_order(
            self._loan_id,
            self._lender,
            self._lent.windows[number % 2],
            number % 2,
            min(WINDOW_BYTES, last - start),
            self._config.data_timeout_s,
        )
        await self._windows.agent.fetch(order)

    def _fill(self, start: int, last: int, number: int) -> "asyncio.Task[Empty]":
        order = FillWindow(self._loan_id, number % 2, start, min(WINDOW_BYTES, last - start))
        call = self._client.call(self._lender, methods.FILL_WINDOW, order, self._config.data_timeout_s)
        return asyncio.create_task(call)

    async def _borrow(self) -> None:
        """From the first that lends. Raises BatonError, the last one's reason."""
        failure: BatonError = PeerLost("nobody has these weights")
        for lender in self._lenders:
            try:
                wanted = BorrowWeights(self._loan_id, self._weights)
                timeout_s = self._config.control_timeout_s
                self._lent = await self._client.call(lender, methods.BORROW_WEIGHTS, wanted, timeout_s)
            except BatonError as error:
                failure = error
            else:
                self._lender = lender
                self._windows = await self._make_windows(2, _lends_nothing)
                return
        raise failure

    async def _close(self) -> None:
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        if self._windows is not None:
            await self._windows.close()
        if self._lent is not None:
            with suppress(BatonError):  # then the loan ends by itself
                given_back, timeout_s = GiveBackWeights(self._loan_id), self._config.control_timeout_s
                await self._client.call(self._lender, methods.GIVE_BACK_WEIGHTS, given_back, timeout_s)


def _lends_nothing(_: SlabHeader) -> bool:
    return False
