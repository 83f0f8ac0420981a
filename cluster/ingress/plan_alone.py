"""How an ingress plans by itself while the global scheduler is away: power of two choices by its own count. Pure."""

import random
from collections.abc import Mapping, Sequence

from cluster.scheduler.rules import can_pair
from cluster.scheduler.traffic import choose_generation
from core.errors import NoReplica
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import Plan, Reserve


def plan_alone(
    request: Reserve,
    replicas: Sequence[ReplicaInfo],
    weights: Mapping[str, float],
    in_use: Mapping[str, int],
    chance: random.Random,
) -> Plan:
    """Among `replicas` of the last address book, in the request's generation or one that the last known traffic
    split gives it. `in_use`: requests of this ingress by decode replica. Raises NoReplica.
    """
    decodes = [replica for replica in replicas if replica.role is Role.DECODE]
    if not decodes:
        raise NoReplica("no decode replica is known", retry_after_s=2.0)
    generations = {decode.generation for decode in decodes}
    generation = request.generation
    if generation not in generations:
        generation = choose_generation(request.request_id, generations, weights)
    decodes = _without([decode for decode in decodes if decode.generation == generation], request.avoid)
    two = chance.sample(decodes, min(2, len(decodes)))
    decode = min(two, key=lambda replica: in_use.get(replica.replica_id, 0))
    prefills = [replica for replica in replicas if replica.role is Role.PREFILL]
    partners = [p for p in prefills if can_pair(p, decode) and request.num_tokens <= p.max_model_len]
    partners = [] if request.placement == "local" else _without(partners, request.avoid)
    prefill = chance.choice(partners) if partners else None
    return Plan(request.request_id, request.attempt, prefill, decode, 0.0, 0.0, "fallback")


def _without(replicas: list[ReplicaInfo], avoid: tuple[str, ...]) -> list[ReplicaInfo]:
    """Leaves out the replicas that just failed the request, unless none would be left."""
    return [replica for replica in replicas if replica.replica_id not in avoid] or replicas
