"""The default policy: as many replicas as the TTFT and ITL targets ask for at the present load."""

from math import isinf

from cluster.autoscaling.itl_model import ItlModel
from cluster.autoscaling.signals import Demand, FleetSignals, PoolDemand
from cluster.autoscaling.steady import steady_demand
from core.autoscaling_config import AutoscalingConfig

LEAST_SLACK = 0.1  # of the TTFT target left for queueing when a prompt's own prefill takes nearly all of it


class SloPolicy:
    """Several rules for each pool; the one that needs most wins and gives the reason."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config
        self._itl_model = ItlModel()

    def demand(self, signals: FleetSignals) -> Demand:
        """See policy.Policy."""
        steady = steady_demand(signals.workload.requests_per_s, signals, self._config)
        prefill = (steady.prefill, self._backlog(signals, steady.prefill.num_replicas), self._ttft(signals))
        decode = (steady.decode, self._batch(signals), self._kv(signals), self._itl(signals))
        return Demand(_largest(*prefill), _largest(*decode))

    def _backlog(self, signals: FleetSignals, num_steady: float) -> PoolDemand:
        """What comes, and what queues: (queued + outstanding) / (n * rate) within the TTFT target.

        No replica comes sooner than `replica_start_s`: with a longer start the backlog is spread over that time.
        Sized to the target alone, a fleet would grow by start / target times what it lacks, and then stand idle.
        """
        pool = signals.prefill
        backlog = pool.queued_prompt_tokens + pool.outstanding_prompt_tokens
        if not pool.prefill_tokens_per_s:
            return PoolDemand(1.0 if backlog else 0.0, f"{backlog} prompt tokens wait and no replica is ready")
        own_s = signals.workload.prompt_tokens_per_request / pool.prefill_tokens_per_s
        slack_s = max(self._config.ttft_target_s - own_s, LEAST_SLACK * self._config.ttft_target_s)
        horizon_s = max(slack_s, self._config.replica_start_s)
        num_busy = num_steady * self._config.prefill_utilization  # catching up may use the reserve
        num = num_busy + backlog / (pool.prefill_tokens_per_s * horizon_s)
        return PoolDemand(num, f"{backlog} prompt tokens to catch up with within {horizon_s:.0f} s")

    def _ttft(self, signals: FleetSignals) -> PoolDemand:
        """One more than serve now while the target is missed, as the fast loop of Dynamo's planner does."""
        ttft_s = signals.predicted_ttft_s
        own_s = signals.workload.prompt_tokens_per_request / (signals.prefill.prefill_tokens_per_s or 1.0)
        more_helps = not isinf(ttft_s) and ttft_s - own_s > LEAST_SLACK * self._config.ttft_target_s
        if ttft_s <= self._config.ttft_target_s or not more_helps:
            return PoolDemand(0.0, "TTFT within its target")
        num = signals.prefill.num_ready + 1
        return PoolDemand(num, f"predicted TTFT {ttft_s:.2f} s above {self._config.ttft_target_s:g} s")

    def _batch(self, signals: FleetSignals) -> PoolDemand:
        """needed = ceil(ready * load / target), the rule of Kubernetes' HorizontalPodAutoscaler; ceil comes later."""
        pool, num_requests = signals.decode, self._num_decoding(signals)
        if not pool.max_num_seqs:
            return PoolDemand(1.0 if num_requests else 0.0, f"{num_requests:.0f} requests wait and no replica is ready")
        num = num_requests / (pool.max_num_seqs * self._config.decode_batch_share)
        return PoolDemand(num, f"{num_requests:.0f} requests for batches of {pool.max_num_seqs}")

    def _kv(self, signals: FleetSignals) -> PoolDemand:
        """The same rule; those who wait will take what those who run take on average."""
        pool = signals.decode
        growth = max(1.0, self._num_decoding(signals) / max(1, pool.num_running))
        num = min(pool.num_ready * pool.kv_usage * growth / self._config.decode_kv_usage, self._most(signals))
        return PoolDemand(num, f"KV use {pool.kv_usage:.0%}")

    def _itl(self, signals: FleetSignals) -> PoolDemand:
        """Replicas so that the batch of each keeps a step within the target; from experience, else in proportion.

        Who waits will be in a batch, too: while the scheduler lets nobody into a full one, its steps say nothing.
        """
        pool, target_s = signals.decode, self._config.itl_target_s
        if not pool.num_ready or not pool.num_running or not pool.itl_s:
            return PoolDemand(0.0, "nothing decodes")
        self._itl_model.add(pool.num_running / pool.num_ready, pool.itl_s)
        batch = self._itl_model.batch_within(target_s)
        growth = 1 + pool.num_waiting / pool.num_running
        num = growth * (pool.num_running / batch if batch else pool.num_ready * pool.itl_s / target_s)
        return PoolDemand(
            min(num, self._most(signals)), f"ITL {pool.itl_s * 1e3:.0f} ms, target {target_s * 1e3:.0f} ms"
        )

    def _num_decoding(self, signals: FleetSignals) -> float:
        """Who will run at once when the queue is worked off within `replica_start_s`.

        Of those who wait that is stay / horizon: short answers come one after another through the same slots. Who waits
        for prefill counts as well, beside steady traffic: by the time prefill has grown, decode must have, too.
        """
        pool, workload = signals.decode, signals.workload
        stay_s = workload.decode_s_per_request
        if not stay_s:
            return pool.num_running + pool.num_waiting
        share = min(1.0, stay_s / max(self._config.ttft_target_s, self._config.replica_start_s))
        steady = workload.requests_per_s * stay_s
        return max(pool.num_running + share * pool.num_waiting, steady + share * signals.num_waiting)

    @staticmethod
    def _most(signals: FleetSignals) -> float:
        """A request is not shared out: more replicas than requests bring nothing."""
        return signals.decode.num_running + signals.decode.num_waiting


def _largest(*demands: PoolDemand) -> PoolDemand:
    return max(demands, key=lambda demand: demand.num_replicas)
