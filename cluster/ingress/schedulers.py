"""Which global scheduler an ingress asks: the first one while it answers, else its standby, if there is one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from core.errors import BatonError, PeerLost

Resolve = Callable[[], Awaitable[str]]  # finds the present address, host:port. Raises PeerLost


class Schedulers:
    """Addresses are remembered, so that the standby is asked at once when the first one falls silent."""

    def __init__(self, resolves: Sequence[Resolve], timeout_s: float) -> None:
        """`resolves` in order of preference, each of which may take `timeout_s`."""
        self._resolves = resolves
        self._timeout_s = timeout_s
        self._known = [""] * len(resolves)
        self._current = 0

    @property
    def on_standby(self) -> bool:
        """The first one does not answer."""
        return self._current > 0

    async def address(self) -> str:
        """Of the one that is asked now. Raises PeerLost."""
        if not self._known[self._current]:
            self._known[self._current] = await self._found(self._current)
        return self._known[self._current]

    @property
    def known_address(self) -> str:
        """Of the one that is asked now; empty while nobody has found it."""
        return self._known[self._current]

    def failed(self, address: str) -> None:
        """Nobody answered there: the address is looked up again, and the next scheduler is asked meanwhile.

        Empty: the address that is asked now was not found. Of many calls that fail at once the first one counts.
        """
        if address == self._known[self._current]:
            self._known[self._current] = ""
            self._current = (self._current + 1) % len(self._resolves)

    async def look_around(self) -> str:
        """Learns where the others are; returns the first one's address while that is not asked, else nothing."""
        for number in range(len(self._resolves)):
            if number != self._current:
                try:
                    self._known[number] = await self._found(number)
                except BatonError:
                    self._known[number] = ""
        return self._known[0] if self.on_standby else ""

    def return_to_first(self) -> None:
        """It answers again."""
        self._current = 0

    async def _found(self, number: int) -> str:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._resolves[number]()
        except TimeoutError as error:
            raise PeerLost("nobody knows the scheduler's address") from error
