"""Memory through which weights pass between two ranks, window by window, over the KV data plane.

Weights may be packed, or lie anywhere, so the lender copies a run of their image into a window, and the borrower
fetches the window as if it were blocks of KV: with the same channels, deadlines, tokens and digests.
"""

from collections.abc import Awaitable, Callable

import torch
from torch import Tensor

from core.kv_layout import Compatibility, KVLayout
from core.messages.to_rank import Copy, FetchBlocks, Span
from engine.shared_memory import SharedMemory
from kv_transfer.agent import TransferAgent
from kv_transfer.channels.select import Connect
from kv_transfer.outbound import MayRead
from rpc.client import RpcClient
from rpc.methods import WEIGHT_CALLS
from worker.peers import RpcPeerControl
from worker.spec import RankSpec

WINDOW_BYTES = 2**24
_BLOCK_BYTES = 2**20
_BLOCKS = WINDOW_BYTES // _BLOCK_BYTES
_LAYOUT = KVLayout(1, 1, _BLOCK_BYTES // 4, 1, "float32", 1, latent=True)


def window_memory(num_windows: int, device: torch.device) -> SharedMemory:
    """Takes some ms per window. Raises ConfigurationError when there is no memory."""
    return SharedMemory(num_windows * WINDOW_BYTES, device, "weights on their way")


class WeightWindows:
    """Windows of one rank and the agent that moves them."""

    def __init__(
        self,
        memory: SharedMemory,
        *,
        spec: RankSpec,
        address: str,
        weights: Compatibility,
        client: RpcClient,
        connect: Connect,
        may_read: MayRead,
    ) -> None:
        config = spec.transfer.model_copy(update={"wire_dtype": ""})
        self._memory = memory
        pool = self._memory.bytes.view(torch.float32).view(1, -1, 1, 1, 1, _LAYOUT.head_dim)
        self.agent = TransferAgent(
            address=address,
            incarnation=spec.incarnation,
            pool=pool,
            layout=_LAYOUT,
            compatibility=weights,
            config=config,
            connectors=connect(config, spec.host, pool, self._memory.path),
            control=RpcPeerControl(client, config, WEIGHT_CALLS),
            may_read=may_read,
        )

    def memory(self, window: int) -> Tensor:
        """uint8 [WINDOW_BYTES], a view."""
        return self._memory.bytes[window * WINDOW_BYTES : (window + 1) * WINDOW_BYTES]

    async def close(self) -> None:
        """Nothing is read or written any more."""
        await self.agent.close()
        self._memory.close()


MakeWindows = Callable[[int, MayRead], Awaitable[WeightWindows]]  # raises ConfigurationError


def blocks_of(window: int) -> tuple[int, ...]:
    """Of the pool that the windows make up."""
    return tuple(range(window * _BLOCKS, (window + 1) * _BLOCKS))


def fetch_order(
    loan_id: str, lender: str, source_blocks: tuple[int, ...], window: int, num_bytes: int, timeout_s: float
) -> FetchBlocks:
    """The first bytes of a lender's window into one of ours."""
    num_blocks = -(-num_bytes // _BLOCK_BYTES)
    source, destination = (Span(0, 1, blocks[:num_blocks], 0, 1) for blocks in (source_blocks, blocks_of(window)))
    return FetchBlocks(loan_id, 0, (lender,), _LAYOUT, (Copy(0, source, destination),), timeout_s, due_s=timeout_s)
