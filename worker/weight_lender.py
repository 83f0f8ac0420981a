"""Lends a living rank's weights to ranks that start."""

import asyncio
import logging
import time
from dataclasses import dataclass

from core.errors import StaleMessage, Unavailable
from core.kv_layout import Compatibility
from core.messages.fleet import Acknowledged, Empty
from core.messages.to_lender import BorrowWeights, FillWindow, GiveBackWeights, LentWeights
from core.messages.to_rank import SlabHeader
from kv_transfer.agent import TransferAgent
from worker.weight_image import StoredImage
from worker.weight_windows import WINDOW_BYTES, MakeWindows, WeightWindows, blocks_of

logger = logging.getLogger(__name__)

MAX_LOANS = 4  # borrowers beyond them read their disks


@dataclass
class _Loan:
    number: int  # its windows are 2 * number and the next
    used_at: float


class WeightLender:
    """One per rank. Has memory and an agent only while something is lent; belongs to one event loop."""

    def __init__(
        self,
        weights: Compatibility,
        stored: StoredImage,
        make_windows: MakeWindows,
        ttl_s: float,
    ) -> None:
        self._weights = weights
        self._stored = stored
        self._make_windows = make_windows
        self._ttl_s = ttl_s
        self._loans: dict[str, _Loan] = {}
        self._free = list(range(MAX_LOANS))
        self._windows: WeightWindows | None = None
        self._changing = asyncio.Lock()  # held while windows are made, filled or freed
        self._expiring: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._loans)

    @property
    def agent(self) -> TransferAgent:
        """Raises StaleMessage while nothing is lent."""
        if self._windows is None:
            raise StaleMessage("no weights are lent", field="loan_id")
        return self._windows.agent

    async def lend(self, message: BorrowWeights) -> LentWeights:
        """Raises Incompatible naming the field, Unavailable when all windows are lent."""
        self._weights.require_equal(message.weights)
        async with self._changing:
            loan = self._loans.get(message.loan_id)
            if loan is None:
                if not self._free:
                    raise Unavailable(f"weights are lent to {MAX_LOANS} ranks already")
                if self._windows is None:
                    self._windows = await self._make_windows(2 * MAX_LOANS, self._may_read)
                    self._expiring = asyncio.create_task(self._expire())
                loan = self._loans[message.loan_id] = _Loan(self._free.pop(), time.monotonic())
        return LentWeights((blocks_of(2 * loan.number), blocks_of(2 * loan.number + 1)))

    async def fill(self, message: FillWindow) -> Empty:
        """Answers when the window holds the bytes. Raises StaleMessage when the loan is over."""
        async with self._changing:
            loan = self._loans.get(message.loan_id)
            if loan is None or self._windows is None:
                raise StaleMessage(f"no weights are lent as {message.loan_id}", field="loan_id")
            loan.used_at = time.monotonic()
            window = self._windows.memory(2 * loan.number + message.window % 2)
            num_bytes = min(message.num_bytes, WINDOW_BYTES)
            await asyncio.to_thread(self._stored.read, message.first_byte, num_bytes, window)
        return Empty()

    async def give_back(self, message: GiveBackWeights) -> Acknowledged:
        """Idempotent."""
        async with self._changing:
            loan = self._loans.pop(message.loan_id, None)
            if loan is not None:
                self._free.append(loan.number)
                await self._free_when_idle()
        return Acknowledged(loan is not None)

    async def close(self) -> None:
        """Ends all loans."""
        async with self._changing:
            self._loans.clear()
            await self._free_when_idle()

    def _may_read(self, header: SlabHeader) -> bool:
        return header.request_id in self._loans

    async def _expire(self) -> None:
        while self._windows is not None:
            await asyncio.sleep(self._ttl_s / 4)
            async with self._changing:
                now = time.monotonic()
                for loan_id in [name for name, loan in self._loans.items() if now - loan.used_at > self._ttl_s]:
                    logger.warning("weights lent as %s were not given back", loan_id)
                    del self._loans[loan_id]  # its windows may still be read: they are free when the agent is gone
                await self._free_when_idle()

    async def _free_when_idle(self) -> None:
        if self._loans or self._windows is None:
            return
        windows, self._windows = self._windows, None
        await windows.close()
        self._free = list(range(MAX_LOANS))
        expiring, self._expiring = self._expiring, None
        if expiring is not None and expiring is not asyncio.current_task():
            expiring.cancel()
