"""Who caches which prefix: block hash -> replicas. Pure."""

from collections.abc import Iterable, Sequence

from core.block_hash import BlockHash


class PrefixIndex:
    """Exact as of the last report; removing a replica costs time proportional to what it held."""

    def __init__(self) -> None:
        self._holders: dict[BlockHash, set[str]] = {}
        self._held: dict[str, set[BlockHash]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def store(self, replica_id: str, hashes: Iterable[BlockHash]) -> None:
        """The replica now caches these blocks."""
        held = self._held.setdefault(replica_id, set())
        for block_hash in hashes:
            held.add(block_hash)
            self._holders.setdefault(block_hash, set()).add(replica_id)

    def remove(self, replica_id: str, hashes: Iterable[BlockHash]) -> None:
        """The replica caches these blocks no more; unknown ones are ignored."""
        held = self._held.get(replica_id, set())
        for block_hash in hashes:
            if block_hash in held:
                held.discard(block_hash)
                self._discard(replica_id, block_hash)

    def remove_replica(self, replica_id: str) -> None:
        """Forgets all that a replica held."""
        for block_hash in self._held.pop(replica_id, set()):
            self._discard(replica_id, block_hash)

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Replica -> number of leading blocks that it caches; replicas without any are left out."""
        depths: dict[str, int] = {}
        alive: set[str] | None = None
        for depth, block_hash in enumerate(hashes, start=1):
            holders = self._holders.get(block_hash, set())
            alive = set(holders) if alive is None else alive & holders
            if not alive:
                break
            depths.update(dict.fromkeys(alive, depth))
        return depths

    def _discard(self, replica_id: str, block_hash: BlockHash) -> None:
        holders = self._holders[block_hash]
        holders.discard(replica_id)
        if not holders:
            del self._holders[block_hash]
