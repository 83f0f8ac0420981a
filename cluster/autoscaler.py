"""Runs the autoscaling of both pools of a generation: reads signals, asks for targets, has pools resized."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from cluster.autoscaling.autoscaling import Autoscaling
from cluster.autoscaling.signals import FleetSignals, PoolTarget, Targets
from core.autoscaling_config import AutoscalingConfig
from core.errors import BatonError
from core.messages.fleet import Role

logger = logging.getLogger(__name__)

ReadSignals = Callable[[Mapping[Role, PoolTarget]], Awaitable[FleetSignals]]
Resize = Callable[[Role, int], Awaitable[None]]


@dataclass(frozen=True)
class Decision:
    """One tick: what was seen and what was decided."""

    signals: FleetSignals
    targets: Targets


class Autoscaler:
    """Thin shell. `read` gets what was asked for so far, which at the start is what `first_targets` tells."""

    def __init__(
        self,
        config: AutoscalingConfig,
        autoscaling: Autoscaling,
        read: ReadSignals,
        resize: Resize,
        first_targets: Callable[[], Awaitable[Mapping[Role, int]]],
    ) -> None:
        self._config = config
        self._autoscaling = autoscaling
        self._read = read
        self._resize = resize
        self._first_targets = first_targets
        self._asked: dict[Role, PoolTarget] = {}
        self._history: deque[Decision] = deque(maxlen=config.num_history)
        self._task: asyncio.Task[None] | None = None

    @property
    def history(self) -> tuple[Decision, ...]:
        """The last decisions, oldest first."""
        return tuple(self._history)

    def start(self) -> None:
        """Begins to decide every `interval_s`."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Decides no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def tick(self) -> None:
        """One decision. What could not be carried out is asked for again at the next. Raises what a policy raises."""
        if not self._asked:
            first = await self._first_targets()
            self._asked = {role: PoolTarget(num, "as found") for role, num in first.items()}
        signals = await self._read(self._asked)
        targets = await asyncio.to_thread(self._autoscaling.decide, signals)  # a forecast may compute for a second
        self._history.append(Decision(signals, targets))
        # Who shrinks goes first: what it gives back may be what the other gets.
        for role in sorted(Role, key=lambda role: targets.of(role).num_replicas - self._asked[role].num_replicas):
            await self._carry_out(role, targets)

    async def _carry_out(self, role: Role, targets: Targets) -> None:
        target, asked = targets.of(role), self._asked[role].num_replicas
        if target.num_replicas == asked:
            self._asked[role] = target
            return
        try:
            await self._resize(role, target.num_replicas)
        except BatonError as error:
            logger.warning("%s pool stays at %d instead of %d: %s", role, asked, target.num_replicas, error)
            return
        self._asked[role] = target
        logger.info("%s pool from %d to %d replicas: %s", role, asked, target.num_replicas, target.reason)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._config.interval_s)
            try:
                await self.tick()
            except BatonError as error:
                logger.warning("no decision: %s", error)
            except Exception:  # a policy of the user's own may raise anything, and the fleet serves on
                logger.exception("no decision: pools stay as they are")
