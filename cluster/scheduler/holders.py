"""Sets of replicas that hold a block, and in which tier: each set exists once, however many blocks share it. Pure.

Blocks of a prefix are computed together, shared together and evicted one by one from its end, so that millions of
blocks have few different sets of holders, and a run of a prompt's blocks has the very same one.
"""

from weakref import WeakValueDictionary

Planes = tuple[int, ...]  # bit i: replica number i; first who holds it anywhere, then who has it in tier 1, 2 at best


class Holders:
    """One set, compared by identity. A bit is in one tier's plane at most; in none of them the device holds it."""

    __slots__ = ("__weakref__", "everyone", "planes")

    def __init__(self, planes: Planes) -> None:
        self.planes = planes
        self.everyone = planes[0]


class HolderSets:
    """Those that some block has now."""

    def __init__(self) -> None:
        self._sets: WeakValueDictionary[Planes, Holders] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._sets)

    def with_one(self, holders: Holders | None, number: int, tier: int) -> Holders:
        """The set in which a replica holds the block, too, `tier` being the fastest that has it there."""
        bit = 1 << number
        planes = [plane & ~bit for plane in holders.planes] if holders is not None else [0]
        planes[0] |= bit
        if tier:
            planes += [0] * (tier + 1 - len(planes))
            planes[tier] |= bit
        return self._the(planes)

    def without(self, holders: Holders, number: int) -> Holders | None:
        """None when nobody is left."""
        bit = 1 << number
        return self._the([plane & ~bit for plane in holders.planes]) if holders.everyone != bit else None

    def _the(self, planes: list[int]) -> Holders:
        while len(planes) > 1 and not planes[-1]:
            planes.pop()
        key = tuple(planes)
        found = self._sets.get(key)
        if found is None:
            found = self._sets[key] = Holders(key)
        return found
