"""Replicas as plain processes: `python -m prefill_worker SPEC` and `python -m decode_worker SPEC`, one per rank."""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from pydantic import TypeAdapter

from core.channel_kinds import Device
from core.config import ModelConfig, PoolConfig, TransferConfig
from core.errors import PeerLost
from core.messages.fleet import ReplicaInfo, Role
from worker.spec import RANK_ENVIRONMENT, RankSpec, new_incarnation

ROOT = Path(__file__).parents[1]
LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0


def free_address() -> str:
    """host:port of loopback that nothing uses now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return f"{LOOPBACK}:{probe.getsockname()[1]}"


def rank_devices(device: Device, num_ranks: int) -> list[torch.device]:
    """One per rank: the first GPUs, one for several ranks when there are too few."""
    if device == "cpu":
        return [torch.device("cpu")] * num_ranks
    return [torch.device("cuda", i % torch.cuda.device_count()) for i in range(num_ranks)]


def visible_devices(device: torch.device) -> dict[str, str]:
    """Environment that makes a GPU the only one of a process; two processes of one GPU need NCCL >= 2.30 to talk."""
    if device.type == "cpu":
        return {}
    uuid = torch.cuda.get_device_properties(device).uuid
    return {"CUDA_VISIBLE_DEVICES": f"GPU-{uuid}", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}


def replica_ranks(
    name: str, role: Role, model: ModelConfig, pool: PoolConfig, transfer: TransferConfig, block_size: int
) -> list[RankSpec]:
    """Specs of a replica's ranks, on addresses that are free now."""
    addresses = tuple(free_address() for _ in range(pool.num_ranks))
    store, incarnation = free_address(), new_incarnation()
    return [
        RankSpec(role, name, incarnation, rank, addresses, store, model, pool, transfer, block_size)
        for rank in range(pool.num_ranks)
    ]


class RankProcess:
    """One rank; its spec and its log are files in `folder`. `environment` is added to this process's own.

    With `slow_link`, a file of bench.slow_link, what it receives comes over wires of that speed; with `pace`, its steps
    take the time of a device, see bench.paced_rank.
    """

    def __init__(
        self,
        spec: RankSpec,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        slow_link: Path | None = None,
        pace: float | None = None,
    ) -> None:
        self.spec = spec
        self._main, self._arguments = f"{spec.role.value}_worker", list[str]()
        if slow_link is not None:
            self._main, self._arguments = "bench.slow_rank", [str(slow_link)]
        elif pace is not None:
            self._main, self._arguments = "bench.paced_rank", [str(pace)]
        self.process: Process | None = None
        self._environment = (
            os.environ | RANK_ENVIRONMENT | {"OMP_NUM_THREADS": str(spec.pool.resources_per_rank.num_threads)}
        )
        self._environment |= environment or {}
        self._file = folder / f"{spec.replica_id}-{spec.rank}.json"
        self._log = folder / f"{spec.replica_id}-{spec.rank}.log"
        self._file.touch(mode=0o600)  # it may hold the fleet's secret
        self._file.write_bytes(TypeAdapter(RankSpec).dump_json(spec))

    async def start(self, timeout_s: float = START_TIMEOUT_S) -> ReplicaInfo:
        """Returns when the rank serves. Raises PeerLost with its log when it ends before."""
        with self._log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._main,
                str(self._file),
                *self._arguments,
                stdout=PIPE,
                stderr=log,
                cwd=ROOT,
                env=self._environment,
            )
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), timeout_s)
        if not line:
            log_text = await asyncio.to_thread(self.log)
            raise PeerLost(f"{self.spec.replica_id} rank {self.spec.rank} did not start:\n{log_text}")
        return TypeAdapter(ReplicaInfo).validate_json(line)

    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text()

    def kill(self) -> None:
        """Abruptly, unless it ended already."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    async def wait(self) -> int:
        """Exit status of a started rank."""
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), END_TIMEOUT_S)


@asynccontextmanager
async def rank_processes(
    ranks: Sequence[RankProcess], timeout_s: float = START_TIMEOUT_S
) -> AsyncIterator[dict[str, ReplicaInfo]]:
    """All ranks of some replicas, from serving to killed; yields what they told about themselves by replica id."""
    try:
        infos = await asyncio.gather(*(rank.start(timeout_s) for rank in ranks))
        yield {info.replica_id: info for info in infos}
    finally:
        for rank in ranks:
            rank.kill()
        await asyncio.gather(*(rank.wait() for rank in ranks if rank.process is not None))
