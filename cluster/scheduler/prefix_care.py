"""Prefixes that many requests begin with are copied to more replicas before their holders are too busy. Pure.

A request's shared prefix is what some replica has of its prompt already. Each time that one is used it saves the time
of computing it, and its holders compute the rest of the prompt. Where that work, per second and holder, comes near what
one replica can do, requests would soon have to wait there, or compute the prefix elsewhere while they wait:

    load(prefix) = rate of its requests * seconds of computing what they add / number of holders

Above `COPY_ABOVE` it is copied to one more replica that prefills; it goes from one that nobody asks for it any more as
all cached blocks do, the least recently used first. One copy of a prefix is under way at a time.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp

from cluster.scheduler.replica_view import ReplicaView
from core.block_hash import BlockHash
from core.messages.fleet import ReplicaInfo

WINDOW_S = 20.0
COPY_ABOVE = 0.5  # of a replica's time
MOST_PREFIXES = 1024  # watched; the least recently used are forgotten
REST_S = 2.0  # between two copies of a prefix: as long as it takes to see what came of one
LEAST_REQUESTS = 3.0  # in the window, before a prefix counts as shared


@dataclass(frozen=True)
class Copy:
    """One replica shall take a prefix over from another."""

    taker: ReplicaInfo
    source: ReplicaInfo
    block_hashes: tuple[BlockHash, ...]


@dataclass
class _Prefix:
    num_requests: float = 0.0  # decayed
    rest_s: float = 0.0  # of computing what follows, summed over these
    seen_at: float = 0.0
    copied_at: float = float("-inf")

    def used(self, rest_s: float, now: float) -> None:
        fading = exp(-(now - self.seen_at) / WINDOW_S)
        self.num_requests = self.num_requests * fading + 1
        self.rest_s = self.rest_s * fading + rest_s
        self.seen_at = now


class PrefixCare:
    """Told of each decision; where it asks who holds a prefix, it may want a copy."""

    def __init__(self, least_tokens: int) -> None:
        """Shorter prefixes are computed faster than they are copied."""
        self._least_tokens = least_tokens
        self._prefixes: OrderedDict[BlockHash, _Prefix] = OrderedDict()
        self._copies: list[Copy] = []

    def used(self, key: BlockHash, num_tokens: int, rest_s: float, now: float) -> bool:
        """A request begins with the prefix that ends in this block, and its rest takes `rest_s` to compute.

        Whether that prefix is busy enough to look at its holders.
        """
        if num_tokens < self._least_tokens:
            return False
        prefix = self._prefixes.setdefault(key, _Prefix(seen_at=now))
        self._prefixes.move_to_end(key)
        if len(self._prefixes) > MOST_PREFIXES:
            self._prefixes.popitem(last=False)
        prefix.used(rest_s, now)
        is_shared = prefix.num_requests >= LEAST_REQUESTS and prefix.rest_s / WINDOW_S > COPY_ABOVE
        return is_shared and now - prefix.copied_at >= REST_S

    def held(
        self,
        block_hashes: tuple[BlockHash, ...],
        holders: Sequence[ReplicaView],
        others: Iterable[ReplicaView],
        now: float,
    ) -> None:
        """Who has the whole prefix, and which replicas that prefill do not."""
        prefix = self._prefixes[block_hashes[-1]]
        taker = min(others, key=_load, default=None)
        if holders and taker is not None and prefix.rest_s / WINDOW_S / len(holders) > COPY_ABOVE:
            prefix.copied_at = now
            self._copies.append(Copy(taker.info, min(holders, key=_load).info, block_hashes))

    def take_copies(self) -> list[Copy]:
        """Copies to be made, since the last call."""
        copies, self._copies = self._copies, []
        return copies


def _load(view: ReplicaView) -> tuple[int, str]:
    return view.outstanding_prefill_tokens, view.info.replica_id
