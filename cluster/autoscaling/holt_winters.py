"""Holt-Winters smoothing by statsmodels (extra `forecast`): level and time of day, later days weighing more."""

from typing import Any

from cluster.autoscaling.forecast import RateBins
from core.autoscaling_config import ForecastConfig
from core.errors import ConfigurationError

LEAST_DAYS = 2  # seasonal terms cannot be told from noise with fewer


class HoltWinters:
    """A Forecaster. Fits once per bin, on the days seen; a fit takes about a second at 144 bins a day."""

    def __init__(self, config: ForecastConfig) -> None:
        if config.num_days < LEAST_DAYS:
            raise ConfigurationError(
                f"autoscaling.forecast.num_days {config.num_days} is below {LEAST_DAYS}, which holt_winters needs",
                field="autoscaling.forecast.num_days",
            )
        self._model = _exponential_smoothing()
        self._num_days = config.num_days
        self._bins = RateBins(config)
        self._present: int | None = None
        self._ahead: list[float] = []  # a day from the present bin on

    def observe(self, epoch_s: float, requests_per_s: float) -> None:
        """See Forecaster."""
        number = self._bins.observe(epoch_s, requests_per_s)
        if number != self._present:
            self._present = number
            self._ahead = self._fit(number)

    def forecast(self, epoch_s: float) -> float | None:
        """See Forecaster."""
        if not self._ahead or self._present is None:
            return None
        return self._ahead[(int(epoch_s // self._bins.bin_s) - self._present) % len(self._ahead)]

    def _fit(self, present: int) -> list[float]:
        """The day from the present bin on, nothing while a bin of the last two days is missing."""
        per_day = self._bins.per_day
        days = [self._day(present - back * per_day) for back in range(1, self._num_days + 1)]
        known: list[float] = []
        for day in days:
            if day is None:
                break
            known = day + known
        if len(known) < LEAST_DAYS * per_day:
            return []
        fitted = self._model(known, seasonal="add", seasonal_periods=per_day, initialization_method="heuristic").fit(
            optimized=False, smoothing_level=0.2, smoothing_seasonal=0.3
        )
        return [max(0.0, float(rate)) for rate in fitted.forecast(per_day)]

    def _day(self, first: int) -> list[float] | None:
        rates = [self._bins.mean(number) for number in range(first, first + self._bins.per_day)]
        known = [rate for rate in rates if rate is not None]
        return known if len(known) == len(rates) else None


def _exponential_smoothing() -> Any:
    try:
        from statsmodels.tsa.holtwinters import ExponentialSmoothing
    except ImportError as error:
        raise ConfigurationError(
            "autoscaling.forecast.kind holt_winters needs statsmodels: pip install 'baton-llm[forecast]'",
            field="autoscaling.forecast.kind",
        ) from error
    return ExponentialSmoothing
