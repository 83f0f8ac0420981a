"""What a handoff adds to a request, beside the same request prefilled by decode itself.

Bound: what overlap cannot hide. All blocks but those of the last layer group of the last chunk can travel while prefill
computes, so the second token (the first that decode makes) cannot come sooner after the request than with local prefill
plus one copy of that last piece; the copy's speed is memory bandwidth, measured here, in the same run. What lies above
the bound is control messages, a channel slower than memory, and two ranks that compete for the same cores.
The first token comes from prefill and waits for no transfer: its bound is the first token of local prefill.

The ranks of one prefill replica and one decode rank are processes; scheduler and orchestrator run in this one, without
Ray and HTTP. Requests come one at a time, placements in turns, every prompt different so that nothing is cached.

    python -m bench.handoff --channel shared_memory
    python -m bench.handoff --device cuda --shape 8b
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch

from bench.control_plane import ControlPlane, control_plane
from bench.handoff_report import Line, Seen, compare, print_lines, summarise
from bench.handoff_timeline import plot_timelines, print_timeline, read_handoff
from bench.random_checkpoint import SHAPES, write_random_checkpoint
from bench.rank_processes import RankProcess, rank_devices, rank_processes, replica_ranks, visible_devices
from bench.report import print_json
from cluster.ingress.generation import Generation
from cluster.settings import demo_model_path
from core.channel_kinds import ChannelKind, Device
from core.config import ModelConfig, PoolConfig, RankResources, SchedulerConfig, TransferConfig
from core.kv_layout import KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_decode import Phases
from core.sampling import SamplingParams
from engine.checkpoint import load_model_spec
from engine.layer_groups import layer_groups
from engine.model_spec import ModelSpec

PLACEMENTS = ("pair", "local")
REQUEST_TIMEOUT_S = 600.0
NUM_BLOCKS = 384


def measure_copy(num_bytes: int, devices: Sequence[torch.device], repeats: int) -> float:
    """Median seconds of one copy from the first device's memory to the last's."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=devices[0]).view(torch.int64)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=devices[-1]).view(torch.int64)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
            torch.cuda.synchronize(target.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def last_piece_bytes(layout: KVLayout, num_tokens: int, pool: PoolConfig, transfer: TransferConfig) -> int:
    """Bytes of the last layer group of a prompt's last chunk: nothing is left to compute beside their transfer."""
    chunk = num_tokens % pool.max_num_batched_tokens or pool.max_num_batched_tokens
    num_layers = layer_groups(layout.num_layers, transfer.layers_per_group, transfer.last_layers_per_group)[-1]
    layers, end = range(layout.num_layers - num_layers, layout.num_layers), layout.num_blocks_for(num_tokens)
    num_cells = 0  # one layer of one block each
    for group in layout.kv_groups:
        first = max((num_tokens - chunk) // layout.block_size, group.first_needed(num_tokens, layout.block_size))
        num_cells += len(group.places(layers)) * (end - first)
    return num_cells * layout.cell_bytes


async def run_request(plane: ControlPlane, name: str, prompt: Sequence[int], num_output: int, placement: str) -> Seen:
    """One greedy request."""
    generation = Generation(
        name, tuple(prompt), SamplingParams(num_output, temperature=0.0), REQUEST_TIMEOUT_S, placement
    )
    started, times, phases = time.perf_counter(), list[float](), Phases()
    async with aclosing(plane.orchestrator.generate(generation)) as events:
        async for event in events:
            times += [time.perf_counter() - started] * len(event.token_ids)
            phases = event.phases or phases
            assert event.num_resumes == 0, "a request that was planned anew measures something else"
    gaps = [after - before for before, after in pairwise(times[1:])]
    return Seen(times[0], times[1], statistics.median(gaps), phases)


class HandoffBench:
    """One fleet's configuration, and what runs on it."""

    def __init__(self, args: argparse.Namespace, checkpoint: Path) -> None:
        self._args = args
        self._spec: ModelSpec = load_model_spec(checkpoint, args.dtype)
        self._model = ModelConfig(path=str(checkpoint), name="bench", dtype=args.dtype)
        self._transfer = TransferConfig(channel=args.channel or default_channel(args.device))
        device: Device = args.device
        self._pool = PoolConfig(
            device=device,
            num_blocks=NUM_BLOCKS,
            max_num_batched_tokens=args.chunk,
            resources_per_rank=RankResources(num_threads=args.threads),
        )
        split: dict[str, Any] = {"pipeline_parallel": args.prefill_stages, "tensor_parallel": args.prefill_tensor}
        if args.prefill_stages > 1:
            split |= {"steps_in_flight": 2, "engine": {"attention": "torch"}}
        prefill = PoolConfig.model_validate(self._pool.model_dump() | split)
        self._pools = {Role.PREFILL: prefill, Role.DECODE: self._pool}
        self._devices = rank_devices(device, prefill.num_ranks + 1)

    async def run(self, folder: Path) -> list[Line]:
        """All prompt lengths, on one fleet."""
        specs = [
            spec
            for role, pool in self._pools.items()
            for spec in replica_ranks(f"{role.value}0", role, self._model, pool, self._transfer, self._args.block_size)
        ]
        ranks = [
            RankProcess(spec, folder, visible_devices(device))
            for spec, device in zip(specs, self._devices, strict=True)
        ]
        scheduler = SchedulerConfig(local_prefill_max_tokens=0)
        async with (
            rank_processes(ranks, self._args.start_timeout) as infos,
            control_plane(scheduler, self._transfer, self._args.block_size) as plane,
        ):
            for info in infos.values():
                plane.register(info)
            await plane.until_ready(len(self._pools))
            lines = []
            for length in self._args.prompt:
                lines += await self._measure(plane, length)
            if self._args.timeline is not None:
                await self._show_timeline(plane, {info.role: info for info in infos.values()})
            return lines

    async def _measure(self, plane: ControlPlane, length: int) -> list[Line]:
        rng = random.Random(f"{self._args.seed} {length}")
        seen: dict[str, list[Seen]] = {placement: [] for placement in PLACEMENTS}
        for i in range(self._args.repeats + 1):  # the first connects and warms up
            for placement in PLACEMENTS if i % 2 else reversed(PLACEMENTS):
                prompt = [rng.randrange(self._spec.vocab_size) for _ in range(length)]
                one = await run_request(plane, f"{length}-{placement}-{i}", prompt, self._args.output, placement)
                if i:
                    seen[placement].append(one)
        layout = self._spec.kv_layout(1, self._args.block_size)
        piece = last_piece_bytes(layout, length, self._pool, self._transfer)
        local = summarise(length, "local", seen["local"], None)
        bound_s = local.second_token_s + measure_copy(piece, self._devices, 5)
        return [summarise(length, "pair", seen["pair"], bound_s), local]

    async def _show_timeline(self, plane: ControlPlane, infos: dict[Role, ReplicaInfo]) -> None:
        """One handoff more, of the longest prompt."""
        length = max(self._args.prompt)
        rng = random.Random(self._args.seed)
        prompt = [rng.randrange(self._spec.vocab_size) for _ in range(length)]
        await run_request(plane, "timeline", prompt, self._args.output, "pair")
        timeline = await read_handoff(plane.client, infos, "timeline")
        print_timeline(timeline)
        await asyncio.to_thread(plot_timelines, [(f"{length} tokens", timeline)], self._args.timeline)


def default_channel(device: Device) -> ChannelKind:
    """The one that fits the device anywhere."""
    return "nccl" if device == "cuda" else "gloo"


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, default="160m", help="random weights")
    model.add_argument("--checkpoint", type=Path)
    model.add_argument("--demo", action="store_true", help="the bundled model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=get_args(Device), default="cpu")
    parser.add_argument("--channel", choices=get_args(ChannelKind), help="gloo on cpu, nccl on cuda")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512, 1024], help="tokens")
    parser.add_argument("--output", type=int, default=16, help="tokens, at least 3")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one prefill step")
    parser.add_argument("--prefill-stages", type=int, default=1, help="pipeline parallel degree of prefill")
    parser.add_argument("--prefill-tensor", type=int, default=1, help="tensor parallel degree of prefill")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--repeats", type=int, default=9, help="requests of each length and placement")
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds for a rank to load")
    parser.add_argument("--timeline", type=Path, help="PNG of one handoff more, of the longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = demo_model_path() if args.demo else args.checkpoint or folder / "model"
        if not args.demo and args.checkpoint is None:
            write_random_checkpoint(checkpoint, SHAPES[args.shape], args.seed)
        lines = asyncio.run(HandoffBench(args, checkpoint).run(folder))
    print_lines(lines)
    results = [asdict(line) | {"ratio_to_bound": line.ratio_to_bound} for line in lines]
    print_json("handoff", args, seed=args.seed, pair_to_local=compare(lines), results=results)


if __name__ == "__main__":
    main()
