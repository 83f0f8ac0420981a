"""Where a rank's weights come from: its disk, or a peer that has them, whichever is faster at the time.

The first stretch is read from disk, the second from the peer, each of those that follow from the source that was faster
the last time it was used; a peer that fails is given up. Waiting is what counts: a source that works ahead while
parameters are put in place is as fast as it seems.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from core.errors import BatonError
from engine.parameters import Parameter, ReadParameters


class _Source:
    def __init__(self, name: str, read: ReadParameters) -> None:
        self.name = name
        self.read = read
        self.num_bytes = 0
        self.seconds_per_byte = 0.0  # of the last stretch; 0 before the first
        self.failure = ""


class WeightSources:
    """Reads each parameter from one of two sources."""

    def __init__(
        self, disk: ReadParameters, peer: ReadParameters, dtype: str, stretch_bytes: int, clock: Callable[[], float]
    ) -> None:
        """`stretch_bytes`: read at least from a source before it is judged; weights smaller than that stay on disk."""
        self._disk = _Source("disk", disk)
        self._peer = _Source("peer", peer)
        self._dtype = dtype
        self._stretch_bytes = stretch_bytes
        self._clock = clock

    def read(self, parameters: Sequence[Parameter]) -> Iterator[Tensor]:
        """See ReadParameters. Raises what the disk raises."""
        for stretch in self._stretches(parameters):
            source = self._choose()
            num_read = 0
            try:
                for tensor in self._timed(source, stretch):
                    yield tensor
                    num_read += 1
            except BatonError as error:
                if source is not self._peer:
                    raise
                source.failure = f"{type(error).__name__}: {error}"
                yield from self._timed(self._disk, stretch[num_read:])

    def summary(self) -> str:
        """How much came from where."""
        parts = [
            f"{source.num_bytes / 1e6:.0f} MB from {source.name}{f' ({source.failure})' if source.failure else ''}"
            for source in (self._disk, self._peer)
            if source.num_bytes or source.failure
        ]
        return ", ".join(parts)

    def _choose(self) -> _Source:
        if self._peer.failure or not self._disk.seconds_per_byte:
            return self._disk
        return min(self._peer, self._disk, key=lambda source: source.seconds_per_byte)

    def _timed(self, source: _Source, stretch: Sequence[Parameter]) -> Iterator[Tensor]:
        tensors, num_bytes, seconds = source.read(stretch), 0, 0.0
        for parameter in stretch:
            asked_at = self._clock()
            tensor = next(tensors)
            seconds += self._clock() - asked_at
            num_bytes += parameter.num_bytes(self._dtype)
            source.num_bytes += parameter.num_bytes(self._dtype)
            yield tensor
        source.seconds_per_byte = max(seconds, 1e-9) / max(num_bytes, 1)

    def _stretches(self, parameters: Sequence[Parameter]) -> Iterator[tuple[Parameter, ...]]:
        taken: list[Parameter] = []
        num_bytes = 0
        for parameter in parameters:
            taken.append(parameter)
            num_bytes += parameter.num_bytes(self._dtype)
            if num_bytes >= self._stretch_bytes:
                yield tuple(taken)
                taken, num_bytes = [], 0
        if taken:
            yield tuple(taken)
