"""Replicas that a steady request rate needs in both pools, from the measured work of a request."""

from cluster.autoscaling.signals import Demand, FleetSignals, PoolDemand
from core.autoscaling_config import AutoscalingConfig


def steady_demand(rate: float, signals: FleetSignals, config: AutoscalingConfig) -> Demand:
    """The ratio rule of DistServe (Zhong et al., OSDI 2024): each pool in proportion to the work that it gets.

    prefill = rate * prompt tokens to compute / (tokens/s of a replica * prefill_utilization)
    decode  = rate * seconds that a request stays / (max_num_seqs * decode_batch_share), by Little's law

    A request stays on decode while it decodes and, its blocks being promised, while it is prefilled; what it queues
    there is left out, which is for lack of prefill replicas.

    A pool without a ready replica has no measured rate: it needs one as soon as anything comes.
    """
    if not rate:
        return Demand(PoolDemand(0.0, "no requests"), PoolDemand(0.0, "no requests"))
    prefill, decode, workload = signals.prefill, signals.decode, signals.workload
    tokens_per_s = prefill.prefill_tokens_per_s * config.prefill_utilization
    num_slots = decode.max_num_seqs * config.decode_batch_share
    num_prefills = rate * workload.prompt_tokens_per_request / tokens_per_s if tokens_per_s else 1.0
    rate_of_one = prefill.prefill_tokens_per_s
    own_prefill_s = workload.prompt_tokens_per_request / rate_of_one if rate_of_one else 0.0
    stay_s = workload.decode_s_per_request + own_prefill_s
    num_decodes = rate * stay_s / num_slots if num_slots else 1.0
    return Demand(
        PoolDemand(num_prefills, f"{rate:.2f} requests/s of {workload.prompt_tokens_per_request:.0f} prompt tokens"),
        PoolDemand(num_decodes, f"{rate:.2f} requests/s of {stay_s:.1f} s on decode"),
    )
