"""What a transfer agent asks of its peers; carried by RPC in a fleet, by a method call in one process."""

from typing import Protocol

from core.messages.fleet import Acknowledged
from core.messages.to_rank import BlockDigests, CloseChannel, Connect, Connected, DigestBlocks, Granted, Ready


class PeerControl(Protocol):
    """Calls to another rank's agent. Raise what the peer raised, or PeerLost when it cannot be reached."""

    async def connect(self, address: str, message: Connect) -> Connected:
        """Answered by TransferAgent.on_connect."""
        ...

    async def ready(self, address: str, message: Ready) -> Granted:
        """Answered by TransferAgent.on_ready."""
        ...

    async def digest(self, address: str, message: DigestBlocks) -> BlockDigests:
        """Answered by TransferAgent.on_digest."""
        ...

    async def close(self, address: str, message: CloseChannel) -> Acknowledged:
        """Answered by TransferAgent.on_close."""
        ...
