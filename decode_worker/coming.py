"""Blocks that a transfer is bringing to decode, by content: who else waits for them instead of having them sent. Pure.

expect (first request) --arrived--> cached, given to all waiters
                       --lost-----> waiters must ask for them anew
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from core.block_hash import BlockKey

Waiter = TypeVar("Waiter", bound=Hashable)
Key = tuple[str, BlockKey]  # the replica that sends it, and the content: who waits must not wait for a slower replica


@dataclass
class ComingBlocks(Generic[Waiter]):
    """Each block is expected from one transfer at a time; waiters are known by any key of the caller's."""

    _waiters: dict[Key, dict[Waiter, None]] = field(default_factory=dict)  # of each expected block, in order

    def __len__(self) -> int:
        return len(self._waiters)

    def prefix(self, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        """The leading blocks that are on their way."""
        for number, key in enumerate(keys):
            if key not in self._waiters:
                return keys[:number]
        return keys

    def expect(self, keys: Iterable[Key]) -> list[Key]:
        """A transfer will bring these; returns those that none was bringing yet."""
        fresh = [key for key in keys if key not in self._waiters]
        for key in fresh:
            self._waiters[key] = {}
        return fresh

    def wait(self, waiter: Waiter, keys: Iterable[Key]) -> None:
        """The waiter takes these blocks when they arrive."""
        for key in keys:
            self._waiters[key][waiter] = None

    def awaits(self, waiter: Waiter, keys: Iterable[Key]) -> bool:
        """Whether the waiter is still to be given one of these."""
        return any(waiter in self._waiters.get(key, ()) for key in keys)

    def settle(self, key: Key) -> list[Waiter]:
        """A block arrived, or its transfer is over without it; returns who waited."""
        return list(self._waiters.pop(key, ()))

    def forget(self, waiter: Waiter, keys: Iterable[Key]) -> None:
        """The waiter no longer wants these."""
        for key in keys:
            self._waiters.get(key, {}).pop(waiter, None)
