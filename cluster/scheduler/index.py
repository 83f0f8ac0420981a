"""Who caches which prefix: key of a block (hash and KV group) -> replicas. Pure."""

from collections.abc import Iterable, Sequence

from core.block_hash import BlockHash, BlockKey, in_group
from core.kv_groups import needed_run

Reaches = tuple[int | None, ...]  # by KV group, see core.kv_groups.KVGroup.reach


class PrefixIndex:
    """Exact as of the last report; removing a replica costs time proportional to what it held."""

    def __init__(self) -> None:
        self._holders: dict[BlockKey, set[str]] = {}
        self._held: dict[str, set[BlockKey]] = {}
        self._reaches: dict[str, Reaches] = {}  # of replicas that hold something

    def __len__(self) -> int:
        return len(self._holders)

    def store(self, replica_id: str, keys: Iterable[BlockKey], reaches: Reaches = (None,)) -> None:
        """The replica now caches these blocks, too; `reaches`, always the same, say which of a prefix it needs."""
        held = self._held.setdefault(replica_id, set())
        self._reaches[replica_id] = reaches
        for key in keys:
            held.add(key)
            self._holders.setdefault(key, set()).add(replica_id)

    def remove(self, replica_id: str, keys: Iterable[BlockKey]) -> None:
        """The replica caches these blocks no more; unknown ones are ignored."""
        held = self._held.get(replica_id, set())
        for key in keys:
            if key in held:
                held.discard(key)
                self._discard(replica_id, key)

    def remove_replica(self, replica_id: str) -> None:
        """Forgets all that a replica held."""
        self._reaches.pop(replica_id, None)
        for key in self._held.pop(replica_id, set()):
            self._discard(replica_id, key)

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Replica -> number of leading blocks that it need not compute; replicas without any are left out.

        What core.kv_groups.deepest_prefix says of each one's cache, for all replicas in one pass.
        """
        depths: dict[str, int] = {}
        for reaches in set(self._reaches.values()):
            depths |= self._match_alike(hashes, reaches)
        return depths

    def _match_alike(self, hashes: Sequence[BlockHash], reaches: Reaches) -> dict[str, int]:
        """Of the replicas with these reaches. Runs of blocks held, up to this one, are kept for their holders alone."""
        alike = {replica_id for replica_id, found in self._reaches.items() if found == reaches}
        depths: dict[str, int] = {}
        runs: list[dict[str, int]] = [{} for _ in reaches]
        for depth, block_hash in enumerate(hashes, start=1):
            for number, reach in enumerate(reaches):
                holders, before = self._holders.get(in_group(block_hash, number), set()) & alike, runs[number]
                runs[number] = {replica_id: before.get(replica_id, 0) + 1 for replica_id in holders}
                if reach is None:
                    alike &= holders
            if not alike:
                break
            able = (
                {replica_id for replica_id, run in found.items() if run >= needed_run(reach, depth)}
                for found, reach in zip(runs, reaches, strict=True)
            )
            depths |= dict.fromkeys(set.intersection(*able), depth)
        return depths

    def _discard(self, replica_id: str, key: BlockKey) -> None:
        holders = self._holders[key]
        holders.discard(replica_id)
        if not holders:
            del self._holders[key]
