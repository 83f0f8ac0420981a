"""The rate of the days to come from that of the days before, on a synthetic week."""

import random
from datetime import UTC, datetime
from math import cos, pi

import pytest

from cluster.autoscaling.forecast import DAY_S, ForecastFloor, SeasonalNaive, make_forecaster
from cluster.autoscaling.signals import FleetSignals, PoolSignals, Workload
from core.autoscaling_config import AutoscalingConfig, ForecastConfig
from core.errors import ConfigurationError

MONDAY = datetime(2026, 11, 16, tzinfo=UTC).timestamp()
BIN_S = 1800


def rate_at(epoch_s: float) -> float:
    """2 requests/s at midnight, 10 at noon."""
    return 6 - 4 * cos(2 * pi * (epoch_s % DAY_S) / DAY_S)


def error_on_sunday(config: ForecastConfig, ahead_s: float = 3600) -> float:
    """Mean absolute error of forecasts an hour ahead, relative to the mean rate of 6, after six noisy days."""
    forecaster, noise, errors = make_forecaster(config), random.Random(1), []
    for at in range(int(MONDAY), int(MONDAY) + 7 * DAY_S, BIN_S // 3):
        forecaster.observe(at, rate_at(at) * noise.uniform(0.8, 1.2))
        if at >= MONDAY + 6 * DAY_S:
            errors.append(abs(forecaster.forecast(at + ahead_s) - rate_at(at + ahead_s)))
    return sum(errors) / len(errors) / 6


def test_seasonal_naive_learns_the_day():
    three = error_on_sunday(ForecastConfig(kind="seasonal_naive", num_days=3, bin_s=BIN_S))
    assert three < 0.07
    assert three < error_on_sunday(ForecastConfig(kind="seasonal_naive", num_days=1, bin_s=BIN_S))


def test_holt_winters_learns_the_day():
    pytest.importorskip("statsmodels")
    assert error_on_sunday(ForecastConfig(kind="holt_winters", num_days=4, bin_s=BIN_S)) < 0.12


def test_holt_winters_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.tsa.holtwinters", None)
    with pytest.raises(ConfigurationError, match=r"baton-llm\[forecast\]"):
        make_forecaster(ForecastConfig(kind="holt_winters"))
    with pytest.raises(ConfigurationError, match="num_days 1 is below 2"):
        make_forecaster(ForecastConfig(kind="holt_winters", num_days=1))


def test_nothing_is_said_before_a_day_was_seen_and_old_days_are_forgotten():
    forecaster = SeasonalNaive(ForecastConfig(kind="seasonal_naive", num_days=2, bin_s=BIN_S))
    for at in range(0, DAY_S, BIN_S):
        assert forecaster.forecast(at) is None
        forecaster.observe(at, 5.0)
    assert forecaster.forecast(DAY_S) == 5.0
    for at in range(DAY_S, 3 * DAY_S, BIN_S):
        forecaster.observe(at, 1.0)
    assert forecaster.forecast(2 * DAY_S) == 3.0
    assert forecaster.forecast(3 * DAY_S) == 1.0


def signals_at(epoch_s: float, rate: float, num_ready: int = 1) -> FleetSignals:
    prefill = PoolSignals(num_ready, num_ready, 0, 0, 0, 1000.0 * bool(num_ready), 0, 16, 0.0, 0.0)
    decode = PoolSignals(num_ready, num_ready, 0, 0, 0, 0.0, 0, 16 * bool(num_ready), 0.0, 0.0)
    workload = Workload(rate, 350.0, 5.65)
    return FleetSignals(epoch_s, datetime.fromtimestamp(epoch_s, UTC), prefill, decode, workload)


def test_the_floor_is_there_before_the_load_even_from_zero():
    """10 requests/s of 350 tokens at 700 tokens/s: 5 prefill; held 5.65 + 0.35 s in 12 slots of each: 5 decode."""
    config = AutoscalingConfig(
        replica_start_s=600, forecast=ForecastConfig(kind="seasonal_naive", num_days=1, bin_s=600)
    )
    floor = ForecastFloor(make_forecaster(config.forecast), config)
    for at in range(0, DAY_S, 60):
        floor.floor(signals_at(at, rate=10.0 if at >= 9 * 3600 else 0.0))
    asked = [floor.floor(signals_at(DAY_S + at, rate=0.0, num_ready=0)) for at in range(7 * 3600, 9 * 3600, 60)]
    first = next(i for i, demand in enumerate(asked) if demand.prefill.num_replicas)
    assert first == 100, "two starts of ten minutes before nine"
    assert asked[first].prefill.num_replicas == pytest.approx(5.0)
    assert asked[first].decode.num_replicas == pytest.approx(5.0)
    assert asked[first].prefill.reason == "forecast of 10.00 requests/s of 350 prompt tokens"
