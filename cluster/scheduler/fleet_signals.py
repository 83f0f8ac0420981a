"""What the scheduler knows of load, put into the words of the autoscaler. Pure."""

from collections.abc import Sequence
from datetime import datetime
from statistics import fmean
from typing import NamedTuple

from cluster.autoscaling.signals import FleetSignals, PoolSignals
from cluster.scheduler.admission import Admission
from cluster.scheduler.asked_sizes import Asked
from cluster.scheduler.replica_view import ReplicaView
from cluster.scheduler.rules import has_free_slot, takes_more
from core.messages.fleet import Role


def fleet_signals(admission: Admission, generation: str, asked: Asked, now: float, wall: datetime) -> FleetSignals:
    """Signals of one generation at `now`. Those who wait count at the pool without room, at both when neither has any;
    where nobody prefills, at decode.

    Counting them at both always would have a full decode pool grow the idle prefill pool too.
    """
    prefills, decodes = (admission.fleet.in_generation(role, generation, now) for role in (Role.PREFILL, Role.DECODE))
    prefill_is_full = not any(takes_more(prefill) for prefill in prefills)
    decode_is_full = not prefills or not any(
        has_free_slot(decode, admission.max_decode_kv_usage) and admission.policy.keeps_itl(0, decode, now)
        for decode in decodes
    )
    waiting, workload = admission.waiting_for(generation, now), admission.workload(generation)
    queue = _Queue(len(waiting), round(sum(request.num_tokens for request in waiting) * workload.uncached_share))
    nobody = _Queue(0, 0)
    return FleetSignals(
        now,
        wall,
        _pool(prefills, asked[Role.PREFILL].num_replicas, queue if prefill_is_full else nobody),
        _pool(decodes, asked[Role.DECODE].num_replicas, queue if decode_is_full or not prefill_is_full else nobody),
        workload.measured(now),
    )


class _Queue(NamedTuple):
    """Requests without a plan, and their prompt tokens as far as they will be computed."""

    num_requests: int
    num_tokens: int


def _pool(replicas: Sequence[ReplicaView], num_target: int, queue: _Queue) -> PoolSignals:
    return PoolSignals(
        num_ready=len(replicas),
        num_target=num_target,
        num_waiting=queue.num_requests,
        queued_prompt_tokens=queue.num_tokens,
        outstanding_prompt_tokens=sum(replica.outstanding_prefill_tokens for replica in replicas),
        prefill_tokens_per_s=_mean([replica.prefill_tokens_per_s for replica in replicas]),
        num_running=sum(replica.num_decode_requests for replica in replicas),
        max_num_seqs=round(_mean([replica.info.max_num_seqs for replica in replicas])),
        kv_usage=_mean([_kv_usage(replica) for replica in replicas]),
        itl_s=_mean([replica.status.decode_step_s for replica in replicas if replica.status.num_running]),
    )


def _kv_usage(replica: ReplicaView) -> float:
    return min(1.0, max(0.0, 1 - replica.num_free_blocks / replica.info.num_blocks))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
