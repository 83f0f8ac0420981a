"""Prefixes that replicas compute or are about to: who comes with the same one is best sent there. Pure.

Reports tell of a block when it is computed. Until then whoever begins like one under way would be computed once more
elsewhere: a burst of questions about one document by as many replicas as there are.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from core.block_hash import BlockHash, num_common

NOTHING_COMES: Mapping[str, int] = {}


class _Coming(NamedTuple):
    """One attempt at a prompt; `depth`: its blocks that were there before."""

    request_id: str
    replica_id: str
    hashes: Sequence[BlockHash]
    depth: int


class ComingPrefixes:
    """Of prompts by request, from their plan until the report that follows their first token."""

    def __init__(self) -> None:
        self._by_request: dict[str, _Coming] = {}
        self._by_first: dict[BlockHash, dict[str, _Coming]] = {}  # the first block that is computed anew -> by request
        self._computed: defaultdict[str, list[_Coming]] = defaultdict(list)  # by replica: its report will tell

    def __len__(self) -> int:
        return len(self._by_request)

    def begin(self, request_id: str, replica_id: str, hashes: Sequence[BlockHash], depth: int) -> None:
        """A prompt of these whole blocks is sent to a replica that has the first `depth` of them."""
        self.end(request_id)
        if depth < len(hashes):
            one = self._by_request[request_id] = _Coming(request_id, replica_id, hashes, depth)
            self._by_first.setdefault(hashes[depth], {})[request_id] = one

    def computed(self, request_id: str) -> None:
        """Its first token is out."""
        if (one := self._by_request.get(request_id)) is not None:
            self._computed[one.replica_id].append(one)

    def reported(self, replica_id: str) -> None:
        """The index knows what the replica had computed by then."""
        for one in self._computed.pop(replica_id, ()):
            if self._by_request.get(one.request_id) is one:  # and not a later attempt elsewhere
                self.end(one.request_id)

    def lost(self, replica_id: str) -> None:
        """Nothing comes there any more."""
        self._computed.pop(replica_id, None)
        for request_id in [name for name, one in self._by_request.items() if one.replica_id == replica_id]:
            self.end(request_id)

    def end(self, request_id: str) -> None:
        """Its replica will not compute it. Idempotent."""
        one = self._by_request.pop(request_id, None)
        if one is not None:
            first = one.hashes[one.depth]
            del self._by_first[first][request_id]
            if not self._by_first[first]:
                del self._by_first[first]

    def depths(self, hashes: Sequence[BlockHash]) -> Mapping[str, int]:
        """By replica, how many leading blocks of another prompt it will have, where more than it has now."""
        by_first = self._by_first
        if not by_first:
            return NOTHING_COMES
        found: dict[str, int] = {}
        for first in hashes:
            if first in by_first:
                for one in by_first[first].values():
                    depth = num_common(one.hashes, hashes, one.depth + 1)
                    if depth > found.get(one.replica_id, 0):
                        found[one.replica_id] = depth
        return found
