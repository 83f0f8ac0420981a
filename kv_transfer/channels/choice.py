"""Which transport joins two ranks: the first that both have, or the fastest; what does not work is passed over. Pure.

A receiver offers, the sender takes the first in common:

    in order     shared_memory, tcp             those that failed to this peer before they moved a byte come last
    by trial     the ones not tried yet, until each has moved `trial_bytes` of real slabs from the peer's host;
                 then the fastest first
"""

from collections import defaultdict
from collections.abc import Sequence

from core.messages.to_rank import Offer


def common(ours: Sequence[Offer], theirs: Sequence[Offer]) -> list[str]:
    """Kinds that both offer with equal reach, in our order of preference."""
    return [offer.kind for offer in ours if offer in theirs]


class TransportChoice:
    """What one rank knows of its ways to its peers, named host:port."""

    def __init__(self, kinds: Sequence[str], trial_bytes: int) -> None:
        """`kinds` in order of preference; `trial_bytes` 0: that order decides."""
        self._kinds = tuple(kinds)
        self._trial_bytes = trial_bytes
        self._failed: dict[str, set[str]] = defaultdict(set)  # by peer
        self._absent: dict[str, set[str]] = defaultdict(set)  # by host: kinds that only we have
        self._moved: dict[tuple[str, str], tuple[int, float]] = {}  # by host and kind: bytes, seconds

    def offers(self, peer: str) -> tuple[str, ...]:
        """Kinds to offer now, in order; never none."""
        failed = self._failed[peer]
        usable = [kind for kind in self._kinds if kind not in failed] + [k for k in self._kinds if k in failed]
        if not self._trial_bytes:
            return tuple(usable)
        host = _host(peer)
        present = [kind for kind in usable if kind not in self._absent[host]]
        untried = [kind for kind in present if kind not in failed and not self._is_tried(host, kind)]
        by_speed = sorted(present, key=lambda kind: (kind in failed, -self._bytes_per_s(host, kind)))
        return tuple(untried or by_speed or usable)

    def taken(self, peer: str, offered: Sequence[str], kind: str | None) -> None:
        """The peer took one, or None: it has none of those that come before."""
        missing = offered if kind is None else offered[: list(offered).index(kind)]
        self._absent[_host(peer)].update(missing)

    def moved(self, peer: str, kind: str, num_bytes: int, seconds: float) -> None:
        """A slab came."""
        self._failed[peer].discard(kind)
        key = _host(peer), kind
        before_bytes, before_s = self._moved.get(key, (0, 0.0))
        if not self._is_tried(*key):
            self._moved[key] = before_bytes + num_bytes, before_s + seconds

    def failed(self, peer: str, kind: str) -> None:
        """A channel ended before it moved a byte."""
        self._failed[peer].add(kind)
        if self._failed[peer] >= set(self._kinds):
            self._failed[peer].clear()  # it was the peer, then, and no transport

    def is_spent(self, peer: str, kind: str) -> bool:
        """Whether another kind is due, this one's trial being over."""
        return self._is_tried(_host(peer), kind) and self.offers(peer)[0] != kind

    def _is_tried(self, host: str, kind: str) -> bool:
        return 0 < self._trial_bytes <= self._moved.get((host, kind), (0, 0.0))[0]

    def _bytes_per_s(self, host: str, kind: str) -> float:
        num_bytes, seconds = self._moved.get((host, kind), (0, 1.0))
        return num_bytes / max(seconds, 1e-9)


def _host(peer: str) -> str:
    return peer.rpartition(":")[0]
