"""Keeps a decode replica of a generation for the first that waits beyond its due time for memory or a smaller batch, so
that nobody overtakes it to that one: else shorter ones would take whatever becomes free there, for good. Pure.
"""

from collections.abc import Mapping, Sequence

from cluster.scheduler.fleet_view import FleetView, Pool
from cluster.scheduler.policy import Policy
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import has_room
from cluster.scheduler.waiting_line import Waiting, WaitingLine


class Keeping:
    """Of one line. Who waits for prefill finds room at decode."""

    def __init__(self, line: WaitingLine, fleet: FleetView, policy: Policy, max_decode_kv_usage: float) -> None:
        self._line = line
        self._policy = policy
        self._fleet = fleet
        self._max_decode_kv_usage = max_decode_kv_usage
        self._kept_for: dict[str, str] = {}  # by generation, the request

    def begin(self, generation: str, first: Waiting, decodes: Sequence[ReplicaView], now: float) -> None:
        """The first that waits found no room."""
        if generation not in self._kept_for and self._kept_id(first, decodes, now):
            self._kept_for[generation] = first.request.request_id

    def at(self, pools: Mapping[str, Pool], now: float) -> dict[str, tuple[str, str]]:
        """By generation, for whom a replica is kept, and which.

        Whose room is there has its turn back, if it was put off: others of its tenant would take that.
        """
        found = {}
        for generation, request_id in self._kept_for.items():
            waiting = self._line.find(request_id)
            if waiting is None or generation not in pools:
                continue
            if kept_id := self._kept_id(waiting, pools[generation].replicas, now):
                found[generation] = request_id, kept_id
            else:
                self._line.put_back(waiting)
        self._kept_for = {generation: request_id for generation, (request_id, _) in found.items()}
        return found

    def any_has_room(self, num_tokens: int, decodes: Sequence[ReplicaView], now: float) -> bool:
        """Whether some replica has the memory, and a place in its batch, for a sequence of so many tokens."""
        return any(self._has_room(num_tokens, decode, now) for decode in decodes)

    def _kept_id(self, waiting: Waiting, decodes: Sequence[ReplicaView], now: float) -> str:
        """That which had most room when this began; empty when its token is not due, or room is not what it lacks."""
        if waiting.is_batch or now < waiting.due_at:
            return ""
        num_tokens = waiting.request.num_tokens + waiting.request.max_new_tokens
        kept = self._fleet.get(waiting.kept_id)
        if (kept is None or not kept.usable) and not self.any_has_room(num_tokens, decodes, now):
            holding = [one for one in decodes if num_tokens <= one.info.max_model_len]
            kept = max(holding, key=lambda one: (one.num_free_blocks, one.info.replica_id), default=None)
            waiting.kept_id = kept.info.replica_id if kept is not None else ""
        return waiting.kept_id if kept is not None and not self._has_room(num_tokens, kept, now) else ""

    def _has_room(self, num_tokens: int, decode: ReplicaView, now: float) -> bool:
        in_memory = has_room(num_tokens, decode, 1, self._max_decode_kv_usage)
        return in_memory and self._policy.keeps_itl(num_tokens, decode, now)
