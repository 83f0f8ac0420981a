"""The fleet in Prometheus' format: pools, replicas and their tiers, the link of every pair that has exchanged KV."""

from collections.abc import Callable
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from core.messages.fleet import Role
from core.messages.to_scheduler import FleetStatus


def fleet_exposition(fleet: FleetStatus) -> bytes:
    """Gauges made anew from one status, so that replicas that are gone leave nothing behind."""
    registry = CollectorRegistry()

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"baton_{name}", text, labels, registry=registry)

    gauge("waiting_requests", "Requests at the scheduler without a plan.").set(fleet.num_waiting)
    gauge("reserved_requests", "Requests with a plan that have not finished.").set(fleet.num_reserved)
    replicas = gauge("replicas", "Replicas of a pool that take work.", "pool")
    for role in Role:
        usable = [r for r in fleet.replicas if r.info.role is role and not r.status.draining]
        replicas.labels(role.value).set(len(usable))
    targets = gauge("pool_target_replicas", "Replicas that the autoscaler has asked for.", "generation", "pool")
    for size in fleet.sizes:
        targets.labels(size.generation, size.role.value).set(size.num_replicas)
    running = gauge("replica_running_requests", "Requests in a replica's batch.", "pool", "replica")
    waiting = gauge("replica_waiting_requests", "Requests accepted, not yet running.", "pool", "replica")
    free = gauge("replica_free_blocks", "KV blocks that can be taken now.", "pool", "replica")
    blocks = gauge("replica_blocks", "KV blocks in all.", "pool", "replica")
    warm_up = gauge("replica_warm_up_seconds", "Compilation, graphs and first steps before ready.", "pool", "replica")
    link_rate = gauge(
        "link_bytes_per_second", "Recent speed of KV from one replica to another.", "source", "destination"
    )
    link_digests = gauge("link_digests", "Slabs compared with the sender's, by digest.", "source", "destination")
    link_corrupt = gauge("link_corrupt_transfers", "Transfers dropped: wrong bytes.", "source", "destination")
    link_bytes = gauge("link_bytes", "KV bytes moved since the receiver started.", "source", "destination")
    for replica in fleet.replicas:
        info, status = replica.info, replica.status
        running.labels(info.role.value, info.replica_id).set(status.num_running)
        waiting.labels(info.role.value, info.replica_id).set(status.num_waiting)
        free.labels(info.role.value, info.replica_id).set(status.num_free_blocks)
        blocks.labels(info.role.value, info.replica_id).set(info.num_blocks)
        warm_up.labels(info.role.value, info.replica_id).set(info.warm_up_s)
        for link in status.links:
            link_rate.labels(link.source_id, info.replica_id).set(link.bytes_per_s)
            link_bytes.labels(link.source_id, info.replica_id).set(link.num_bytes)
            link_digests.labels(link.source_id, info.replica_id).set(link.num_digests)
            link_corrupt.labels(link.source_id, info.replica_id).set(link.num_corrupt)
    if fleet.foresight is not None:
        errors = gauge("prediction_relative_error", "Of the scheduler's latest predictions.", "quantity", "quantile")
        num_predictions = gauge("predictions", "Compared with what came since it started.", "quantity")
        for error in fleet.foresight.errors:
            errors.labels(error.quantity, "0.5").set(error.median)
            errors.labels(error.quantity, "0.95").set(error.p95)
            num_predictions.labels(error.quantity).set(error.num_samples)
        hits = gauge("routed_hits", "Plans that counted on cached tokens, by what prefill found.", "outcome")
        hits.labels("found").set(fleet.foresight.num_hits_checked - fleet.foresight.num_hits_missed)
        hits.labels("missed").set(fleet.foresight.num_hits_missed)
        missed_tokens = gauge("routed_hit_missed_tokens", "Tokens computed that plans took for cached.")
        missed_tokens.set(fleet.foresight.num_tokens_missed)
    _tell_of_tiers(gauge, fleet)
    return generate_latest(registry)


def _tell_of_tiers(gauge: Callable[..., Gauge], fleet: FleetStatus) -> None:
    of_tier = ("pool", "replica", "tier")
    tier_gauges = {
        "num_slots": gauge("tier_slots", "Blocks that a tier has room for.", *of_tier),
        "num_cached": gauge("tier_cached_blocks", "Blocks that a tier holds.", *of_tier),
        "num_wanted": gauge("tier_wanted_blocks", "Prefix blocks of prompts that no tier above had.", *of_tier),
        "num_found": gauge("tier_found_blocks", "Those of them that this tier had.", *of_tier),
        "bytes_in": gauge("tier_bytes_in", "From other tiers, over all ranks.", *of_tier),
        "bytes_out": gauge("tier_bytes_out", "To other tiers, over all ranks.", *of_tier),
    }
    hit_ratio = gauge("tier_hit_ratio", "Found of wanted since the replica started.", *of_tier)
    for replica in fleet.replicas:
        for tier in replica.status.tiers:
            labels = replica.info.role.value, replica.info.replica_id, tier.name
            for field, tier_gauge in tier_gauges.items():
                tier_gauge.labels(*labels).set(asdict(tier)[field])
            if tier.num_wanted:
                hit_ratio.labels(*labels).set(tier.num_found / tier.num_wanted)
