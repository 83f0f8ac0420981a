"""The Serve replica of a pool: torch-free; owns the rank processes of one model copy.

It starts one rank in each bundle of its placement group, registers the replica with the global scheduler again and
again, and fails its own health check when a rank has died or hangs, or when the replica was drained on request.

Every replica leaves by `_leave`: Serve asks for it when it scales down, deploys anew, shuts down or empties a node that
Ray drains; a Drain request to the first rank ends there too. A SIGTERM to this process ends it at once: an actor's code
never runs in the main thread, where alone a handler can be set. So what ends a host drains its node (node_drain.py).
"""

import asyncio
import logging
import random
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.local import LOOPBACK
from cluster.names import SCHEDULER_NAME, STANDBY_NAME
from cluster.node_drain import seconds_until_node_goes
from cluster.rank_actor import RankActor
from cluster.replica import prepare_replica
from cluster.scheduler_handle import find_scheduler, reaching_scheduler
from cluster.weight_lenders import weight_lenders
from core.config import BatonConfig, PoolConfig, TransferConfig
from core.errors import BatonError, PeerLost
from core.messages.fleet import Empty, RankHealth, ReplicaInfo, Role
from core.messages.to_scheduler import Deregister, Register, Traffic
from rpc.client import RpcClient
from rpc.methods import DEREGISTER, FLEET, REGISTER
from worker.spec import RANK_ENVIRONMENT, RankSpec, new_incarnation

logger = logging.getLogger(__name__)

HANG_S = 60.0  # a step that takes longer than this means that the rank hangs
SILENCE_S = 10.0  # a rank whose event loop answers nothing for this long is taken for dead
CALL_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 5.0
HEARTBEAT_S = 1.0
DRAINED = "was drained on request"
RANK_NAMESPACE = "baton-ranks"  # where rank actors are found by name, for operators and tests


def leave_timeout_s(pool: PoolConfig, transfer: TransferConfig) -> float:
    """The longest that a replica takes from Serve's word to its end, when all its deadlines are needed."""
    return pool.drain_timeout_s + transfer.rest_timeout_s + 3 * CALL_TIMEOUT_S + CLOSE_TIMEOUT_S


class Supervisor:
    """Deployed once per pool, with the pool's role."""

    async def __init__(self, role: Role, config: BatonConfig, *others: Any) -> None:  # type: ignore[misc]
        """`others` are held so that one application of Serve, which has one root, has all deployments."""
        self._role = role
        self._config = config
        self._others = others
        self._traffic = Traffic()
        self._schedulers: dict[str, Any] = {}  # Serve's handles, by name
        self._scheduler_names = (SCHEDULER_NAME, STANDBY_NAME) if config.scheduler.standby else (SCHEDULER_NAME,)
        self._client = RpcClient(config.cluster.security)
        self._replica_id = f"{role.value}-{serve.get_replica_context().replica_id.unique_id}"
        self._host = prepare_replica(config, self._replica_id)
        self._ranks: list[Any] = []
        self._running: list[Any] = []
        self._info: ReplicaInfo | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._leaving = False
        self._ending = asyncio.Lock()
        self._info = await self._start_ranks()
        self._running = [rank.run.remote() for rank in self._ranks]
        self._heartbeat = asyncio.create_task(self._register_forever())

    async def info(self) -> ReplicaInfo | None:
        """The replica as others see it."""
        return self._info

    async def check_health(self) -> None:
        """Called by Serve every second; raising has the replica replaced, all its ranks with it."""
        failure = await self._failure() if self._ranks else "has left"
        if self._leaving and self._ranks:
            return  # the way out has its own deadlines
        if failure == DRAINED:
            await self._leave(0.0)
        elif failure:
            logger.error("%s is given up: %s", self._replica_id, failure)
            self._kill_ranks()  # else its requests would wait until Serve believes it, and drains what cannot answer
        if failure:
            raise PeerLost(f"{self._replica_id}: {failure}")

    async def _failure(self) -> str:
        """Why the replica cannot go on, or nothing."""
        ended, _ = ray.wait(self._running, num_returns=1, timeout=0) if self._running else ([], [])
        if ended:
            return "a rank has ended"
        try:
            healths = await asyncio.wait_for(self._healths(), SILENCE_S)
        except TimeoutError:
            return f"a rank has not answered for {SILENCE_S:.0f} s"
        except ray.exceptions.RayError as error:
            return f"a rank is lost: {error}"
        if any(health.drained for health in healths):
            return DRAINED
        busy_s = max(health.busy_s for health in healths)
        return f"a rank hangs since {busy_s:.0f} s" if busy_s > HANG_S else ""

    async def __del__(self) -> None:
        """Serve's shutdown hook. On a node that drains its deadline counts too."""
        timeout_s = self._pool_config().drain_timeout_s
        node_s = await asyncio.to_thread(seconds_until_node_goes)
        after_drain_s = leave_timeout_s(self._pool_config(), self._config.transfer) - timeout_s
        await self._leave(max(0.0, min(timeout_s, node_s - after_drain_s)))

    async def _leave(self, timeout_s: float) -> None:
        """Takes no new work, finishes or hands over, deregisters, ends the ranks.

        Repeatable: the earliest deadline holds.
        """
        self._leaving = True
        if self._info is not None and self._ranks:
            await self._drain(timeout_s)
        async with self._ending:
            if self._heartbeat is not None:
                self._heartbeat.cancel()
                await asyncio.gather(self._heartbeat, return_exceptions=True)
            if self._info is not None and self._ranks:
                await self._tell_schedulers(deregister=True)
                await self._close_ranks()
            self._kill_ranks()

    async def _drain(self, timeout_s: float) -> None:
        patience_s = timeout_s + self._config.transfer.rest_timeout_s + CALL_TIMEOUT_S
        try:
            await asyncio.wait_for(self._ranks[0].drain.remote(timeout_s), patience_s)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("%s did not drain: %s", self._replica_id, error)

    async def _close_ranks(self) -> None:
        try:
            await asyncio.wait_for(asyncio.gather(*(rank.close.remote() for rank in self._ranks)), CLOSE_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("%s: a rank did not close: %s", self._replica_id, error)

    def _pool_config(self) -> PoolConfig:
        return self._config.prefill if self._role is Role.PREFILL else self._config.decode

    async def _start_ranks(self) -> ReplicaInfo:
        pool, host = self._pool_config(), self._host
        pool = pool.model_copy(update={"zone": pool.zone or self._node_zone()})
        group = ray.util.get_current_placement_group()
        assert group is not None, "the deployment declares placement_group_bundles"
        resources = pool.resources_per_rank
        for rank in range(pool.num_ranks):
            options = {
                "name": f"{self._replica_id}-rank{rank}",
                "namespace": RANK_NAMESPACE,
                "num_cpus": resources.num_cpus,
                "num_gpus": resources.num_gpus,
                "resources": resources.custom,
                "runtime_env": {"env_vars": RANK_ENVIRONMENT},
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            }
            log = str(Path(self._config.cluster.log_dir) / f"{self._replica_id}-rank{rank}.log")
            self._ranks.append(
                RankActor.options(  # type: ignore[attr-defined]
                    **options
                ).remote(log if self._config.cluster.log_dir else "")
            )
        addresses = tuple(await asyncio.gather(*(rank.free_address.remote(host) for rank in self._ranks)))
        store_address = await self._ranks[0].free_address.remote(LOOPBACK)  # the ranks share a host
        lenders = await self._weight_lenders(pool)
        incarnation = new_incarnation()
        specs = [
            RankSpec(
                role=self._role,
                replica_id=self._replica_id,
                incarnation=incarnation,
                rank=rank,
                rank_addresses=addresses,
                store_address=store_address,
                model=self._config.model,
                pool=pool,
                transfer=self._config.transfer,
                block_size=self._config.block_size,
                security=self._config.cluster.security,
                generation=self._config.generation,
                tenant_salt=self._config.tenant_salt,
                weight_lenders=lenders[rank],
            )
            for rank in range(pool.num_ranks)
        ]
        starts = [rank.start.remote(spec) for rank, spec in zip(self._ranks, specs, strict=True)]
        infos: list[ReplicaInfo] = await asyncio.gather(*starts)
        return infos[0]

    async def _weight_lenders(self, pool: PoolConfig) -> tuple[tuple[str, ...], ...]:
        """For each rank, whom to ask for its weights; nobody while there is no scheduler that knows."""
        try:
            fleet = await self._client.call(await self._scheduler_address(), FLEET, Empty(), CALL_TIMEOUT_S)
        except BatonError:
            return ((),) * pool.num_ranks
        name = self._config.model.served_name
        return weight_lenders(fleet.replicas, name, pool, pool.zone, random.Random())

    def _node_zone(self) -> str:
        """The label of this node that names its rack or zone, or nothing."""
        labels: dict[str, Any] = ray.get_runtime_context().get_node_labels()
        return str(labels.get(self._config.cluster.zone_label, ""))

    async def _healths(self) -> list[RankHealth]:
        return list(await asyncio.gather(*(rank.health.remote() for rank in self._ranks)))

    async def _register_forever(self) -> None:
        while True:
            await self._tell_schedulers(deregister=False)
            await asyncio.sleep(HEARTBEAT_S)

    async def _tell_schedulers(self, *, deregister: bool) -> None:
        """The first one's traffic split is the one to remember."""
        for name in self._scheduler_names:
            try:
                traffic = await self._tell_scheduler(name, deregister=deregister)
            except BatonError as error:
                logger.warning("%s cannot reach %s: %s", self._replica_id, name, error)
            else:
                self._traffic = traffic if name == SCHEDULER_NAME else self._traffic

    async def _tell_scheduler(self, name: str, *, deregister: bool) -> Traffic:
        """Raises BatonError."""
        assert self._info is not None
        address = await self._scheduler_address(name)
        if deregister:
            leaving = Deregister(self._info.replica_id, self._info.incarnation)
            await self._client.call(address, DEREGISTER, leaving, CALL_TIMEOUT_S)
            return self._traffic
        answer = await self._client.call(address, REGISTER, Register(self._info, self._traffic), CALL_TIMEOUT_S)
        return answer.traffic

    async def _scheduler_address(self, name: str = SCHEDULER_NAME) -> str:
        """Raises PeerLost."""
        async with reaching_scheduler(CALL_TIMEOUT_S):
            if name not in self._schedulers:  # the front may have been deployed after us
                self._schedulers[name] = find_scheduler(name)
            address: str = await self._schedulers[name].address.remote()
        return address

    def _kill_ranks(self) -> None:
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            ray.kill(rank)
