"""Which cached blocks lie below the device, in host memory or on disk. Pure: no tensors, no clock.

    device --spill--> host --demote--> disk --forget-->             restore: host or disk --> device

A block that nobody holds on the device any more is copied to the first tier at once, so that evicting it later costs
nothing. A full tier passes its least recently used blocks on to the next one; the last one forgets them. What is being
written or read stays where it is.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from core.block_hash import BlockKey
from core.messages.to_rank import TierMove

DEVICE = 0  # number of the first place that blocks are in; its slots are the pool's block ids


@dataclass
class _Held:
    slot: int
    used_at: float
    is_written: bool = False
    readers: int = 0

    @property
    def is_idle(self) -> bool:
        return self.is_written and not self.readers


@dataclass(frozen=True)
class Spill:
    """Moves to make in this order; `entering` are the blocks by tier that they put in place."""

    moves: tuple[TierMove, ...]
    entering: tuple[tuple[int, BlockKey], ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of the device, that are read."""
        return tuple(slot for move in self.moves if move.source == DEVICE for slot in move.source_slots)


@dataclass(frozen=True)
class Found:
    """Consecutive blocks below the device, read until `end_restore`."""

    keys: tuple[BlockKey, ...]
    tiers: tuple[int, ...]
    slots: tuple[int, ...]

    def moves_to(self, blocks: Sequence[int]) -> tuple[TierMove, ...]:
        """One per tier; `blocks` are those of the device that take the content, in the same order."""
        return tuple(
            TierMove(
                tier,
                DEVICE,
                tuple(slot for slot, of in zip(self.slots, self.tiers, strict=True) if of == tier),
                tuple(block for block, of in zip(blocks, self.tiers, strict=True) if of == tier),
            )
            for tier in sorted(set(self.tiers))
        )


class Tier:
    """One place below the device, least recently used blocks first."""

    def __init__(self, number: int, num_slots: int) -> None:
        self.number = number
        self.num_slots = num_slots
        self.held: OrderedDict[BlockKey, _Held] = OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))

    def find(self, key: BlockKey) -> _Held | None:
        """A block whose content is in place."""
        entry = self.held.get(key)
        return entry if entry is not None and entry.is_written else None

    def touch(self, key: BlockKey, now: float) -> None:
        """Used now; forgotten last."""
        self.held[key].used_at = now
        self.held.move_to_end(key)

    def take_victims(self, count: int) -> list[tuple[BlockKey, int]]:
        """Lets go of idle blocks so that `count` slots are free, or as many as can be; returns those that went."""
        lacking = count - len(self._free)
        victims: list[BlockKey] = []
        for key, entry in self.held.items():
            if len(victims) >= lacking:
                break
            if entry.is_idle:
                victims.append(key)
        return [(key, self.forget(key)) for key in victims]

    def enter(self, keys: Sequence[BlockKey], now: float) -> dict[BlockKey, int]:
        """Slots for the first of these, as many as are free; written once `put` says so."""
        entered = {key: self._free.pop() for key in keys[: len(self._free)]}
        self.held |= {key: _Held(slot, now) for key, slot in entered.items()}
        return entered

    def put(self, key: BlockKey) -> None:
        """The content is in place."""
        self.held[key].is_written = True

    def forget(self, key: BlockKey) -> int:
        """Returns the slot, free again."""
        slot = self.held.pop(key).slot
        self._free.append(slot)
        return slot

    def validate(self) -> None:
        """Raises AssertionError when the books do not balance."""
        slots = [entry.slot for entry in self.held.values()] + self._free
        assert sorted(slots) == list(range(self.num_slots))
        assert all(entry.readers >= 0 for entry in self.held.values())
        assert all(entry.is_written for entry in self.held.values() if entry.readers)


class KVTiers:
    """The tiers of one replica; the same slots on all its ranks. One spill at a time."""

    def __init__(self, sizes: Sequence[int], ttl_s: float | None = None) -> None:
        """`sizes`: slots of each tier, the fastest first. The last one forgets what was unused there for `ttl_s`."""
        self.tiers = [Tier(number, size) for number, size in enumerate(sizes, start=DEVICE + 1)]
        self._ttl_s = ttl_s
        self._changed: set[BlockKey] = set()
        self._spilling: Spill | None = None

    def holds(self, key: BlockKey) -> bool:
        """Whether some tier has it."""
        return any(tier.find(key) is not None for tier in self.tiers)

    def place(self, key: BlockKey) -> int | None:
        """The fastest tier below the device that has it."""
        return next((tier.number for tier in self.tiers if tier.find(key) is not None), None)

    def snapshot(self) -> tuple[BlockKey, ...]:
        """All blocks that some tier has."""
        return tuple({name for tier in self.tiers for name, entry in tier.held.items() if entry.is_written})

    def drain_changed(self) -> set[BlockKey]:
        """Blocks that came or went since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    # ---- spilling -----------------------------------------------------------------------------------------------

    def spill(self, blocks: Mapping[BlockKey, int], now: float) -> Spill | None:
        """How to bring these blocks of the device below it; None when there is nothing to move.

        End it with `spilled` or `spill_failed` before the next one. Blocks that are held already count as used.
        """
        assert self._spilling is None, "one spill at a time"
        if not self.tiers:
            return None
        fresh = [key for key in blocks if not self._use(key, now)]
        moves, entering = self._admit(0, DEVICE, {key: blocks[key] for key in fresh}, now)
        if not moves:
            return None
        self._spilling = Spill(tuple(moves), tuple(entering))
        return self._spilling

    def spilled(self, spill: Spill) -> None:
        """All moves were made."""
        self._end(spill)
        for number, key in spill.entering:
            self._tier(number).put(key)
            self._changed.add(key)

    def spill_failed(self, spill: Spill) -> None:
        """Whatever was to come is not there; nothing writes any more."""
        self._end(spill)
        for number, key in spill.entering:
            self._tier(number).forget(key)

    # ---- restoring ----------------------------------------------------------------------------------------------

    def tiers_of(self, keys: Sequence[BlockKey]) -> list[int]:
        """Where the longest run of leading blocks lies that are below the device."""
        places = (next((t.number for t in self.tiers if t.find(name) is not None), DEVICE) for name in keys)
        return list(takewhile(lambda number: number != DEVICE, places))

    def begin_restore(self, keys: Sequence[BlockKey], now: float) -> Found:
        """That run, to be read."""
        numbers = self.tiers_of(keys)
        run = tuple(keys[: len(numbers)])
        slots = []
        for number, key in zip(numbers, run, strict=True):
            held = self._tier(number).held[key]
            held.readers += 1
            slots.append(held.slot)
        for key in reversed(run):  # so that what follows a block is forgotten before it
            self._use(key, now)
        return Found(run, tuple(numbers), tuple(slots))

    def end_restore(self, found: Found) -> None:
        """Nothing of it is read any more."""
        for key, number in zip(found.keys, found.tiers, strict=True):
            self._tier(number).held[key].readers -= 1

    def expire(self, now: float) -> int:
        """Has the last tier forget what was not used for too long; returns how many."""
        if self._ttl_s is None or not self.tiers:
            return 0
        last = self.tiers[-1]
        expired = []
        for key, entry in last.held.items():
            if now - entry.used_at <= self._ttl_s:
                break
            if entry.is_idle:
                expired.append(key)
        self._forget(last, expired)
        return len(expired)

    def validate(self) -> None:
        """Raises AssertionError when the books do not balance."""
        for tier in self.tiers:
            tier.validate()
        entering = set(self._spilling.entering) if self._spilling is not None else set()
        unwritten = {
            (tier.number, name) for tier in self.tiers for name, entry in tier.held.items() if not entry.is_written
        }
        assert unwritten == entering

    # ---- inside -------------------------------------------------------------------------------------------------

    def _tier(self, number: int) -> Tier:
        return self.tiers[number - DEVICE - 1]

    def _use(self, key: BlockKey, now: float) -> bool:
        for tier in self.tiers:
            if tier.find(key) is not None:
                tier.touch(key, now)
                return True
        return False

    def _admit(
        self, index: int, source: int, slots: Mapping[BlockKey, int], now: float
    ) -> tuple[list[TierMove], list[tuple[int, BlockKey]]]:
        """Moves that bring blocks from slots of `source` into a tier, after those that make room there."""
        tier = self.tiers[index]
        moves: list[TierMove] = []
        entering: list[tuple[int, BlockKey]] = []
        wanted = [key for key in slots if key not in tier.held]
        victims = dict(tier.take_victims(len(wanted)))
        if victims and index + 1 < len(self.tiers):
            moves, entering = self._admit(index + 1, tier.number, victims, now)
        self._changed.update(victims)
        entered = tier.enter(wanted, now)
        if entered:
            taken = tuple(slots[key] for key in entered)
            moves.append(TierMove(source, tier.number, taken, tuple(entered.values())))
            entering += [(tier.number, key) for key in entered]
        return moves, entering

    def _forget(self, tier: Tier, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            tier.forget(key)
            self._changed.add(key)

    def _end(self, spill: Spill) -> None:
        assert spill is self._spilling
        self._spilling = None
