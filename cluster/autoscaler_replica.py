"""The Serve replica that sizes both pools of a generation; it is deployed, and ends, with them."""

from collections.abc import Mapping
from typing import Any

from cluster.autoscaler import Autoscaler, Decision
from cluster.autoscaling.autoscaling import Autoscaling
from cluster.autoscaling.signals import FleetSignals, PoolTarget
from cluster.replica import prepare_replica
from cluster.scaling import PoolScaler
from cluster.scheduler_handle import find_scheduler, reaching_scheduler
from core.config import BatonConfig
from core.messages.fleet import Role

CALL_TIMEOUT_S = 10.0


class PoolAutoscaler:
    """Serve's replica around Autoscaler: signals come from the global scheduler, Serve's controller resizes."""

    async def __init__(self, config: BatonConfig) -> None:  # type: ignore[misc]
        prepare_replica(config, f"autoscaler-{config.generation}")
        self._config = config
        self._scheduler: Any = None
        scaler = PoolScaler(config.generation)
        self._autoscaler = Autoscaler(
            config.autoscaling, Autoscaling.of(config), self._signals, scaler.resize, scaler.targets
        )
        self._autoscaler.start()

    async def history(self) -> tuple[Decision, ...]:
        """The last decisions, oldest first."""
        return self._autoscaler.history

    async def _signals(self, asked: Mapping[Role, PoolTarget]) -> FleetSignals:
        """Raises PeerLost when the scheduler does not answer."""
        async with reaching_scheduler(CALL_TIMEOUT_S):
            if self._scheduler is None:  # the front may be deployed after the pools
                self._scheduler = find_scheduler()
            interval_s = self._config.autoscaling.interval_s
            signals: FleetSignals = await self._scheduler.signals.remote(self._config.generation, asked, interval_s)
        return signals

    async def __del__(self) -> None:
        """Decides no more."""
        await self._autoscaler.close()
