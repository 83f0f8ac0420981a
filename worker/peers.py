"""A rank's calls to its transfer peers."""

from core.config import TransferConfig
from core.messages.fleet import Acknowledged
from core.messages.to_rank import BlockDigests, CloseChannel, Connect, Connected, DigestBlocks, Granted, Ready
from rpc.client import RpcClient
from rpc.methods import CLOSE_CHANNEL, CONNECT, DIGEST_BLOCKS, READY


class RpcPeerControl:
    """kv_transfer's PeerControl over RPC."""

    def __init__(self, client: RpcClient, config: TransferConfig) -> None:
        self._client = client
        self._config = config

    async def connect(self, address: str, message: Connect) -> Connected:
        """Asks the sender to build its end of a channel."""
        return await self._client.call(address, CONNECT, message, self._config.connect_timeout_s)

    async def ready(self, address: str, message: Ready) -> Granted:
        """Grants slabs."""
        return await self._client.call(address, READY, message, self._config.control_timeout_s)

    async def digest(self, address: str, message: DigestBlocks) -> BlockDigests:
        """Asks what slabs hold at their source."""
        return await self._client.call(address, DIGEST_BLOCKS, message, self._config.control_timeout_s)

    async def close(self, address: str, message: CloseChannel) -> Acknowledged:
        """Gives a channel's generation up."""
        return await self._client.call(address, CLOSE_CHANNEL, message, self._config.control_timeout_s)
