"""A floor for both pools from the request rate of the last days: capacity before the morning's load comes.

History is the autoscaler's memory: after its restart the floor is silent until a day was seen again.
"""

from typing import Protocol

from cluster.autoscaling.signals import Demand, FleetSignals, PoolDemand
from cluster.autoscaling.steady import steady_demand
from core.autoscaling_config import AutoscalingConfig, ForecastConfig

DAY_S = 86400


class Forecaster(Protocol):
    """Learns the rate and tells it ahead. Times are seconds of the Unix epoch, so days are those of UTC."""

    def observe(self, epoch_s: float, requests_per_s: float) -> None:
        """The rate at this moment; moments come in order."""
        ...

    def forecast(self, epoch_s: float) -> float | None:
        """Requests per second at a later moment; None while too little was seen."""
        ...


class RateBins:
    """Mean rates over bins of `bin_s`, of the last `num_days` days and today."""

    def __init__(self, config: ForecastConfig) -> None:
        self.bin_s = config.bin_s
        self.per_day = DAY_S // config.bin_s
        self._num_kept = (config.num_days + 1) * self.per_day
        self._sums: dict[int, tuple[float, int]] = {}  # bin number since the epoch -> sum, count

    def observe(self, epoch_s: float, requests_per_s: float) -> int:
        """Takes a rate in; returns the number of its bin."""
        number = int(epoch_s // self.bin_s)
        total, count = self._sums.get(number, (0.0, 0))
        self._sums[number] = (total + requests_per_s, count + 1)
        for old in [n for n in self._sums if n <= number - self._num_kept] if count == 0 else ():
            del self._sums[old]
        return number

    def mean(self, number: int) -> float | None:
        """Of one bin; None if nothing was seen."""
        total, count = self._sums.get(number, (0.0, 0))
        return total / count if count else None


class SeasonalNaive:
    """Today as the days before: the mean rate of the same time of day over the last `num_days` days."""

    def __init__(self, config: ForecastConfig) -> None:
        self._num_days = config.num_days
        self._bins = RateBins(config)

    def observe(self, epoch_s: float, requests_per_s: float) -> None:
        """See Forecaster."""
        self._bins.observe(epoch_s, requests_per_s)

    def forecast(self, epoch_s: float) -> float | None:
        """See Forecaster."""
        number = int(epoch_s // self._bins.bin_s)
        seen = [self._bins.mean(number - day * self._bins.per_day) for day in range(1, self._num_days + 1)]
        rates = [rate for rate in seen if rate is not None]
        return sum(rates) / len(rates) if rates else None


def make_forecaster(config: ForecastConfig) -> Forecaster | None:
    """The forecaster that `config.kind` names. Raises ConfigurationError when its library is missing."""
    if config.kind == "none":
        return None
    if config.kind == "seasonal_naive":
        return SeasonalNaive(config)
    from cluster.autoscaling.holt_winters import HoltWinters

    return HoltWinters(config)


class ForecastFloor:
    """Observes the rate and asks for what the rate of the time to come needs, by the measured work of a request."""

    def __init__(self, forecaster: Forecaster | None, config: AutoscalingConfig) -> None:
        self._forecaster = forecaster
        self._config = config
        self._last_known: FleetSignals | None = None  # when both pools worked, so that a floor can raise them from zero

    def floor(self, signals: FleetSignals) -> Demand:
        """For the highest rate from now until a replica asked for now is long ready."""
        silent = PoolDemand(0.0, "no forecast")
        if self._forecaster is None:
            return Demand(silent, silent)
        now_s = signals.wall.timestamp()
        self._forecaster.observe(now_s, signals.workload.requests_per_s)
        if signals.prefill.num_ready and signals.decode.num_ready and signals.workload.decode_s_per_request:
            self._last_known = signals
        moments = (now_s, now_s + self._config.replica_start_s, now_s + 2 * self._config.replica_start_s)
        rate = max((rate for at in moments if (rate := self._forecaster.forecast(at)) is not None), default=None)
        if rate is None or self._last_known is None:
            return Demand(silent, silent)
        floor = steady_demand(rate, self._last_known, self._config)
        return Demand(_forecast(floor.prefill), _forecast(floor.decode))


def _forecast(demand: PoolDemand) -> PoolDemand:
    return PoolDemand(demand.num_replicas, f"forecast of {demand.reason}")
