"""From a rule that picks one replica to a whole policy: who decodes, who prefills, who has room at all. Pure."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from cluster.scheduler.candidate import Decision, Terms
from cluster.scheduler.policy import Choices, Memoryless
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import can_pair, fits_prefill, has_room, takes_more, uncached_tokens, without
from core.messages.to_scheduler import Reserve


class Rule(Protocol):
    """Picks a replica for a request."""

    def choose(
        self, request: Reserve, replicas: Sequence[ReplicaView], cached: Mapping[str, int], now: float
    ) -> ReplicaView:
        """One of at least one, all of which have room, in order of their ids."""
        ...

    def chosen(self, request: Reserve, replica: ReplicaView, now: float) -> None:
        """What it chose is what will be."""
        ...


class Stateless:
    """The part of rules that remember nothing."""

    def chosen(self, request: Reserve, replica: ReplicaView, now: float) -> None:
        """Loads are in the view."""


class Staged(Memoryless):
    """Decode is chosen by one rule, then prefill by another; where there is no prefill pool, the latter chooses whom
    the prompt is computed and decoded by.
    """

    def __init__(self, prefill_rule: Rule, decode_rule: Rule, max_kv_usage: float) -> None:
        self._prefill_rule = prefill_rule
        self._decode_rule = decode_rule
        self._max_kv_usage = max_kv_usage

    def decide(self, request: Reserve, choices: Choices) -> Decision | None:
        """See Policy. Waits for a prefill replica with room when there are some."""
        cached, now = choices.cached, choices.now
        if not choices.prefills or request.placement == "local":
            takers = self.with_room(request, choices.decodes, local=True)
            if not takers:
                return None
            decode = self._prefill_rule.choose(request, takers, cached, now)
            self._prefill_rule.chosen(request, decode, now)
            return make_decision(request, None, decode, cached, "local_no_prefill")
        decodes = self.with_room(request, choices.decodes, local=False)
        ready = ready_prefills(request, choices.prefills)
        if not decodes or not ready:
            return None
        decode = self._decode_rule.choose(request, decodes, cached, now)
        partners = [prefill for prefill in ready if can_pair(prefill.info, decode.info)]
        if not partners:
            return None
        prefill = self._prefill_rule.choose(request, partners, cached, now)
        self._decode_rule.chosen(request, decode, now)
        self._prefill_rule.chosen(request, prefill, now)
        return make_decision(request, prefill, decode, cached, "pair")

    def with_room(self, request: Reserve, decodes: Sequence[ReplicaView], *, local: bool) -> list[ReplicaView]:
        """Decode replicas with room, those left out that failed the request."""
        return decodes_with_room(request, decodes, self._max_kv_usage, local=local)


def decodes_with_room(
    request: Reserve, decodes: Sequence[ReplicaView], max_kv_usage: float, *, local: bool
) -> list[ReplicaView]:
    """By id. `local`: the prompt is computed there too."""
    return [
        decode
        for decode in _ordered(without(decodes, request.avoid))
        if has_room(request.num_tokens + 1, decode, decode.info.max_num_batched_tokens if local else 1, max_kv_usage)
    ]


def ready_prefills(request: Reserve, prefills: Sequence[ReplicaView]) -> list[ReplicaView]:
    """Prefill replicas that hold less than about two steps of work, by id."""
    ordered = _ordered(without(prefills, request.avoid))
    return [prefill for prefill in ordered if takes_more(prefill) and fits_prefill(request, prefill.info)]


def make_decision(
    request: Reserve,
    prefill: ReplicaView | None,
    decode: ReplicaView,
    cached: Mapping[str, int],
    reason: str,
    lender: ReplicaView | None = None,
) -> Decision:
    """What a choice takes of its replicas. Published rules predict no times: the terms are empty."""
    taker = prefill or decode
    own = cached.get(taker.info.replica_id, 0)
    depth = max(own, cached.get(lender.info.replica_id, 0)) if lender is not None else own
    held = cached.get(decode.info.replica_id, 0)
    layout = decode.info.layout
    num_blocks = layout.num_blocks_missing(held, request.num_tokens)
    num_cached = depth * taker.info.layout.block_size
    return Decision(
        prefill,
        decode,
        reason,
        Terms(),
        uncached_tokens(request, depth, taker),
        num_blocks,
        float(request.max_new_tokens),
        lender,
        num_transfer_bytes=num_blocks * layout.block_bytes if prefill else 0,
        num_cached_tokens=num_cached,
        num_indexed_tokens=num_cached,
    )


def num_outstanding(replica: ReplicaView) -> int:
    """Requests that were sent there and have not left."""
    return max(replica.num_reservations, replica.status.num_running + replica.status.num_waiting)


def num_cached_tokens(request: Reserve, replica: ReplicaView, cached: Mapping[str, int]) -> int:
    """Of the request's tokens, that a replica need not compute."""
    return request.num_tokens - uncached_tokens(request, cached.get(replica.info.replica_id, 0), replica)


def _ordered(replicas: Sequence[ReplicaView]) -> list[ReplicaView]:
    return sorted(replicas, key=lambda replica: replica.info.replica_id)
