"""One rank from start to end, the same under Ray and as a plain process.

listen -> load (engine thread) -> meet the other ranks -> transfer agent -> role (first rank) -> serve
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from platform import python_version

import torch

from core.block_hash import HASH_SCHEME, BlockHash, chain_seed, salt_of
from core.errors import PeerLost, TransferFailed
from core.kv_layout import DTYPE_BYTES, Compatibility
from core.messages.fleet import Acknowledged, Drain, Empty, RankHealth, ReplicaInfo, Role
from core.messages.to_lender import Borrow, GiveBack, Lent
from core.messages.to_rank import PreparePairs, ReadTimeline, SlabHeader, TierMove, TimelineEvents
from core.version import PROTOCOL, VERSION
from engine.block_pool import BlockPool
from engine.kv_tiers import KVTiers
from kv_transfer.agent import TransferAgent
from kv_transfer.channels.select import Connect, make_connectors
from rpc import methods
from rpc.client import RpcClient
from rpc.server import RpcServer
from worker.device_speed import device_speed, num_active_parameters
from worker.engine_thread import EngineThread
from worker.lender import Lender
from worker.load import LoadedEngine, load_engine
from worker.peers import RpcPeerControl
from worker.port_speed import port_bytes_per_s
from worker.rank_context import RankContext, RoleService
from worker.rank_weights import RankWeights
from worker.reporter import Reporter
from worker.spec import RankSpec
from worker.tier_stores import TierStores, tier_sizes
from worker.tiers import Tiers

logger = logging.getLogger(__name__)

MakeRole = Callable[[RankContext], RoleService]


@dataclass
class _Serving:
    engine: EngineThread
    loaded: LoadedEngine
    weights: RankWeights
    agent: TransferAgent
    tiers: TierStores
    info: ReplicaInfo
    role: RoleService | None  # of the first rank


class Rank:
    """`start`, then `run` until it raises or is cancelled, then `close`."""

    def __init__(self, spec: RankSpec, make_role: MakeRole, connect: Connect = make_connectors) -> None:
        """`connect` makes the rank's transports; others than the configuration names serve ranks of one process."""
        self._spec = spec
        self._make_role = make_role
        self._connect = connect
        self._server = RpcServer(spec.host, spec.security)
        self._client = RpcClient(spec.security)
        self._serving: _Serving | None = None
        self._following: asyncio.Task[None] | None = None
        self._failure = ""

    async def start(self) -> ReplicaInfo:
        """Loads the model and begins to serve. Raises ConfigurationError, PeerLost."""
        spec = self._spec
        address = f"{spec.host}:{self._server.listen(spec.port)}"
        logger.info("rank %d of %s loads %s", spec.rank, spec.replica_id, spec.model.path)
        engine = EngineThread(spec.transfer if spec.role is Role.PREFILL else None)
        weights = RankWeights(spec, address, self._client, self._connect)
        loaded = await engine.run(lambda: load_engine(spec, weights))
        engine.runner = loaded.runner
        info = _replica_info(spec, loaded, address)
        kv_cache = loaded.runner.kv_cache
        agent = TransferAgent(
            address=address,
            incarnation=spec.incarnation,
            pool=kv_cache.tensor,
            layout=info.layout,
            compatibility=info.compatibility,
            config=spec.transfer,
            connectors=self._connect(spec.transfer, spec.host, kv_cache.tensor, kv_cache.path),
            control=RpcPeerControl(self._client, spec.transfer),
            may_read=self._may_read,
        )
        sizes = tier_sizes(info.layout, spec.pool.tiers)
        stores = TierStores(kv_cache.tensor, spec.pool.tiers, sizes)
        self._serving = _Serving(engine, loaded, weights, agent, stores, info, None)
        self._bind_transfer(agent)
        self._server.unary(methods.MOVE_BLOCKS, stores.move)
        weights.lend(loaded.runner.weights, self._server)
        if spec.rank == 0:
            self._serving.role = self._start_role(engine, agent, info, sizes)
        else:
            self._following = asyncio.create_task(engine.follow())
        await self._server.start()
        logger.info("rank %d of %s serves at %s", spec.rank, spec.replica_id, address)
        return info

    async def run(self) -> None:
        """The first rank steps, the others follow. Raises what ended it."""
        serving = self._require_serving()
        try:
            if serving.role is not None:
                await serving.role.run()
            elif self._following is not None:
                await self._following
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            logger.exception("rank %d of %s failed", self._spec.rank, self._spec.replica_id)
            raise

    async def drain(self, timeout_s: float) -> None:
        """Has the whole replica finish or hand over what it holds; other ranks than the first ask that one.

        Returns when nothing is held. Repeatable: the earliest deadline holds. Raises PeerLost.
        """
        serving = self._require_serving()
        if serving.role is not None:
            await serving.role.drainer.drain(timeout_s)
        else:
            config = self._spec.transfer
            answer_s = timeout_s + config.rest_timeout_s + config.control_timeout_s
            await self._client.call(serving.info.address, methods.DRAIN, Drain(timeout_s), answer_s)

    async def until_drained(self) -> None:
        """Returns when the replica was drained, whoever asked for it; only on the first rank."""
        role = self._require_serving().role
        if role is None:
            await asyncio.get_running_loop().create_future()
        else:
            await role.drainer.until_drained()

    async def close(self) -> None:
        """Ends server, transfers, engine; nothing of this rank stays in the process."""
        await self._server.stop()
        if self._serving is not None:
            await self._serving.weights.close()
            await self._serving.agent.close()
            await asyncio.to_thread(self._serving.tiers.close)
            await asyncio.to_thread(self._serving.engine.close, self._serving.loaded.runner.close)
        await self._client.close()

    async def health(self) -> RankHealth:
        """Counters, answered while a step or the load is in progress."""
        serving = self._serving
        if serving is None:
            return RankHealth(False, 0, 0.0, self._failure)
        drained = serving.role is not None and serving.role.drainer.is_drained
        return RankHealth(True, serving.engine.num_steps, serving.engine.busy_s, self._failure, drained)

    def _cache_floors(self, num_blocks: int) -> dict[BlockHash, int]:
        """Blocks that each tenant keeps cached, by the root of its chains."""
        spec = self._spec
        shares = spec.pool.cache_floors.items()
        return {chain_seed(salt_of(spec.tenant_salt, tenant)): int(share * num_blocks) for tenant, share in shares}

    def _start_role(
        self, engine: EngineThread, agent: TransferAgent, info: ReplicaInfo, sizes: Mapping[str, int]
    ) -> RoleService:
        pool = BlockPool(info.num_blocks, keeps_released=bool(sizes), floors=self._cache_floors(info.num_blocks))
        lender = Lender(info, pool, 3 * self._spec.transfer.data_timeout_s)
        books = KVTiers(tuple(sizes.values()), self._spec.pool.tiers.disk_ttl_s if "disk" in sizes else None)
        tiers = Tiers(pool, books, tuple(sizes), info.layout, self._move_on_all_ranks)
        role = self._make_role(RankContext(self._spec, info, engine, pool, agent, lender, tiers, self._client))
        role.bind(self._server)
        self._server.stream(methods.WATCH, Reporter(info, pool, books, role.status, role.samples).watch)

        async def holds(header: SlabHeader) -> Acknowledged:
            return Acknowledged(role.may_read(header))

        async def drain(message: Drain) -> Empty:
            await role.drainer.drain(message.timeout_s)
            return Empty()

        async def borrow(message: Borrow) -> Lent:
            if role.drainer.is_draining:
                return Lent(info, ())
            await tiers.restore(message.block_hashes)
            return lender.lend(message, time.monotonic())

        async def give_back(message: GiveBack) -> Empty:
            lender.give_back(message.loan_id, time.monotonic())
            role.drainer.changed()
            return Empty()

        self._server.unary(methods.HOLDS, holds)
        self._server.unary(methods.DRAIN, drain)
        self._server.unary(methods.BORROW, borrow)
        self._server.unary(methods.GIVE_BACK, give_back)
        return role

    async def _move_on_all_ranks(self, move: TierMove) -> None:
        """Raises a BatonError, TransferFailed only when every rank has answered."""
        serving, timeout_s = self._require_serving(), self._spec.transfer.data_timeout_s
        others = serving.info.rank_addresses[1:]
        calls = (self._client.call(address, methods.MOVE_BLOCKS, move, timeout_s) for address in others)
        results = await asyncio.gather(serving.tiers.move(move), *calls, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            raise next((f for f in failures if not isinstance(f, TransferFailed)), failures[0])

    def _bind_transfer(self, agent: TransferAgent) -> None:
        async def health(_: Empty) -> RankHealth:
            return await self.health()

        async def prepare(message: PreparePairs) -> Empty:
            agent.prepare(message.addresses)
            return Empty()

        async def timeline(message: ReadTimeline) -> TimelineEvents:
            return TimelineEvents(agent.timeline.of(message.request_id))

        self._server.unary(methods.HEALTH, health)
        self._server.unary(methods.CONNECT, agent.on_connect)
        self._server.unary(methods.READY, agent.on_ready)
        self._server.unary(methods.DIGEST_BLOCKS, agent.on_digest)
        self._server.unary(methods.CLOSE_CHANNEL, agent.on_close)
        self._server.unary(methods.PREPARE_PAIRS, prepare)
        self._server.unary(methods.READ_TIMELINE, timeline)
        self._server.unary(methods.FETCH_BLOCKS, agent.fetch)

    def _may_read(self, header: SlabHeader) -> bool:
        """The first rank knows its shares; the others rely on it, since decode fetches from all or none, or asks the
        first one afterwards. Every rank knows which places its stage has of a KV group.
        """
        serving, span = self._require_serving(), header.source
        layout, role = serving.info.layout, serving.role
        groups = layout.groups_of_stage(layout.stage_of(self._spec.rank))
        is_here = 0 <= header.group < len(groups) and (
            span.first_layer + span.num_layers <= len(groups[header.group].layers)
        )
        return is_here and (role is None or role.may_read(header))

    def _require_serving(self) -> _Serving:
        if self._serving is None:
            raise PeerLost("the rank has not started")
        return self._serving


def _replica_info(spec: RankSpec, loaded: LoadedEngine, address: str) -> ReplicaInfo:
    model, layout, num_blocks = loaded.spec, loaded.runner.layout, loaded.runner.num_blocks
    longest = layout.longest_within(num_blocks, spec.pool.num_at_once, model.max_model_len)
    limits = [longest]
    speed = device_speed(torch.device(spec.pool.device), spec.pool.resources_per_rank.num_threads)
    if spec.model.max_model_len is not None:
        limits.append(spec.model.max_model_len)
    return ReplicaInfo(
        replica_id=spec.replica_id,
        role=spec.role,
        incarnation=spec.incarnation,
        rank_addresses=spec.rank_addresses if len(spec.rank_addresses) > 1 else (address,),
        layout=layout,
        compatibility=Compatibility(
            spec.model.served_name,
            model.revision,
            layout.dtype,
            spec.block_size,
            HASH_SCHEME,
        ),
        num_blocks=num_blocks,
        max_num_seqs=spec.pool.max_num_seqs,
        max_num_batched_tokens=spec.pool.max_num_batched_tokens,
        max_model_len=min(limits),
        zone=spec.pool.zone,
        generation=spec.generation,
        software=f"baton {VERSION}, torch {torch.__version__}, Python {python_version()}",
        protocol=PROTOCOL,
        warm_up_s=round(loaded.warm_up_s, 3),
        flop_per_s=speed.flop_per_s * spec.pool.tensor_parallel,
        read_bytes_per_s=speed.read_bytes_per_s * spec.pool.tensor_parallel,
        port_bytes_per_s=port_bytes_per_s(spec.pool.device, max(1, len(spec.rank_addresses))),
        num_active_parameters=num_active_parameters(model),
        parameter_bytes=model.num_parameters * DTYPE_BYTES[model.dtype],
    )
