"""Token events on their way to ingresses: one stream per ingress, one frame per engine step."""

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count

from core.messages.to_decode import TokenEvent, TokenFrame, TokensFrom


class Outbox:
    """Events wait here while an ingress has no stream attached, for as long as `keep_s`."""

    def __init__(self, keep_s: float, on_taken: Callable[[], None] = lambda: None) -> None:
        """`on_taken` is called when a frame has left with all that an ingress had to get."""
        self._keep_s = keep_s
        self._on_taken = on_taken
        self._pending: dict[str, list[TokenEvent]] = {}
        self._waiting_since: dict[str, float] = {}  # ingresses with events and without a stream
        self._arrived: dict[str, asyncio.Event] = {}

    @property
    def num_undelivered(self) -> int:
        """Events that an attached ingress will get; those of absent ones may never be taken."""
        return sum(len(self._pending.get(ingress_id, ())) for ingress_id in self._arrived)

    def put(self, ingress_id: str, event: TokenEvent, now: float) -> None:
        """Adds to the ingress's next frame."""
        self._pending.setdefault(ingress_id, []).append(event)
        if ingress_id in self._arrived:
            self._arrived[ingress_id].set()
        else:
            self._waiting_since.setdefault(ingress_id, now)

    def forget_absent(self, now: float) -> None:
        """Drops the events of ingresses that have not returned in time; their leases expire as well."""
        for ingress_id in self._pending.keys() - self._arrived.keys():  # its stream broke before taking them
            self._waiting_since.setdefault(ingress_id, now)
        for ingress_id, since in list(self._waiting_since.items()):
            if now - since >= self._keep_s:
                del self._waiting_since[ingress_id]
                self._pending.pop(ingress_id, None)

    async def stream(self, message: TokensFrom) -> AsyncIterator[TokenFrame]:
        """Frames for one ingress until it leaves; a newer stream of the same ingress ends this one.

        The first frame comes at once and is empty: it tells that the stream is attached.
        """
        arrived = asyncio.Event()
        replaced = self._arrived.get(message.ingress_id)
        self._arrived[message.ingress_id] = arrived
        self._waiting_since.pop(message.ingress_id, None)
        if replaced is not None:
            replaced.set()
        if self._pending.get(message.ingress_id):
            arrived.set()
        try:
            yield TokenFrame(0, ())
            for sequence in count(1):
                await arrived.wait()
                if self._arrived.get(message.ingress_id) is not arrived:
                    return
                arrived.clear()
                yield TokenFrame(sequence, tuple(self._pending.pop(message.ingress_id, ())))
                self._on_taken()
        finally:
            if self._arrived.get(message.ingress_id) is arrived:
                del self._arrived[message.ingress_id]
