"""Which transport joins two ranks: what both offer, in our order, or the fastest of it in a trial (pure)."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import TransferFailed
from core.messages.to_rank import Offer


def common(ours: Sequence[Offer], theirs: Sequence[Offer]) -> list[str]:
    """Kinds that both offer with equal reach, in our order of preference."""
    return [offer.kind for offer in ours if offer in theirs]


@dataclass(frozen=True)
class Probe:
    """One trial of one kind."""

    kind: str
    num_bytes: int  # that arrived; 0 when the kind failed
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        """0 for a kind that failed."""
        return self.num_bytes / self.seconds if self.num_bytes else 0.0


class MeasuredChoice:
    """Winners of trials by peer host and kinds in common, so that not every pair of ranks is measured."""

    def __init__(self) -> None:
        self._winners: dict[tuple[str, tuple[str, ...]], str] = {}

    def winner(self, host: str, kinds: Sequence[str]) -> str | None:
        """The kind that won among exactly these; None when a trial is due. One kind alone needs none."""
        return kinds[0] if len(kinds) == 1 else self._winners.get((host, tuple(kinds)))

    def conclude(self, host: str, probes: Sequence[Probe]) -> str:
        """Remembers and returns the fastest, the first of equals; `probes` are in the order of preference.

        Raises TransferFailed when all kinds failed; nothing is remembered then.
        """
        best = max(probes, key=lambda probe: probe.bytes_per_s, default=None)
        if best is None or not best.num_bytes:
            raise TransferFailed(
                f"no channel to {host} works, of {', '.join(probe.kind for probe in probes) or 'none'}"
            )
        self._winners[host, tuple(probe.kind for probe in probes)] = best.kind
        return best.kind

    def forget(self, host: str) -> None:
        """A winner failed in service: its host's next pair is measured anew."""
        self._winners = {key: kind for key, kind in self._winners.items() if key[0] != host}
