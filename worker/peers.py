"""A rank's calls to its transfer peers."""

from core.config import TransferConfig
from core.messages.fleet import Acknowledged
from core.messages.to_rank import BlockDigests, CloseChannel, Connect, Connected, DigestBlocks, Granted, Ready
from rpc.client import RpcClient
from rpc.methods import KV_CALLS, AgentCalls


class RpcPeerControl:
    """kv_transfer's PeerControl over RPC, of the agents that move KV or of those that move something else."""

    def __init__(self, client: RpcClient, config: TransferConfig, calls: AgentCalls = KV_CALLS) -> None:
        self._client = client
        self._config = config
        self._calls = calls

    async def connect(self, address: str, message: Connect) -> Connected:
        """Asks the sender to build its end of a channel."""
        return await self._client.call(address, self._calls.connect, message, self._config.connect_timeout_s)

    async def ready(self, address: str, message: Ready) -> Granted:
        """Grants slabs."""
        return await self._client.call(address, self._calls.ready, message, self._config.control_timeout_s)

    async def digest(self, address: str, message: DigestBlocks) -> BlockDigests:
        """Asks what slabs hold at their source."""
        return await self._client.call(address, self._calls.digest, message, self._config.control_timeout_s)

    async def close(self, address: str, message: CloseChannel) -> Acknowledged:
        """Gives a channel's generation up."""
        return await self._client.call(address, self._calls.close, message, self._config.control_timeout_s)
