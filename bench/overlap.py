"""How much of a handoff's time on the wire is hidden behind prefill's compute, with overlap and without.

Bound: the wire itself. A layer group can only leave when it is computed, and the wire takes one slab after another.
What that exposes at least is worked out for each handoff from the moments when its groups were computed and the time
that its slabs were on the wire. Exposed is what lies between prefill's first token and the moment when decode may go
on, control messages included; without overlap that is the whole wire.

Both ranks are processes on this host. A wire that sleeps (bench.slow_link) lies before shared memory, with a speed for
each prompt length that makes its time a given share of the least compute time measured before, so it stands for a
network without taking a core from the engine. Without overlap: one chunk, one layer group.

    python -m bench.overlap --prompt 128 2048 --timeline FILE.png
"""

import argparse
import asyncio
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.control_plane import ControlPlane, control_plane
from bench.handoff import run_request
from bench.handoff_timeline import HandoffTimeline, plot_timelines, print_timeline, read_handoff
from bench.random_checkpoint import SHAPES, write_random_checkpoint
from bench.rank_processes import RankProcess, rank_processes, replica_ranks
from bench.report import milliseconds, print_json, print_table
from bench.slow_link import Speed, write_speed
from core.config import ModelConfig, PoolConfig, SchedulerConfig, TransferConfig
from core.messages.fleet import ReplicaInfo, Role

BLOCK_SIZE = 16
NUM_OUTPUT = 3
UNLIMITED = Speed(1e12, 0.0)
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Mode:
    """How finely prefill announces what it has computed."""

    name: str
    chunk: int  # tokens
    layers_per_group: int
    last_layers_per_group: int


@dataclass(frozen=True)
class Row:
    """Medians of the handoffs of one mode, length and share."""

    mode: str
    num_prompt_tokens: int
    share: float  # the wire's in compute time, as wanted
    compute_s: float
    wire_s: float
    exposed_s: float
    least_exposed_s: float
    hidden_share: float
    most_hidden_share: float
    num_slabs: int
    num_bytes: int


@dataclass(frozen=True)
class Fleet:
    """Two ranks, and the file that tells their wires' speed."""

    plane: ControlPlane
    infos: dict[Role, ReplicaInfo]
    link: Path

    async def hand_off(self, name: str, prompt: Sequence[int], speed: Speed) -> HandoffTimeline:
        """One request, over wires of that speed."""
        write_speed(self.link, speed)
        await run_request(self.plane, name, prompt, NUM_OUTPUT, "pair")
        return await read_handoff(self.plane.client, self.infos, name)


@asynccontextmanager
async def running_fleet(args: argparse.Namespace, mode: Mode, folder: Path) -> AsyncIterator[Fleet]:
    """One prefill and one decode rank."""
    link = folder / "speed"
    write_speed(link, UNLIMITED)
    transfer = TransferConfig(
        channel=args.channel,
        layers_per_group=mode.layers_per_group,
        last_layers_per_group=mode.last_layers_per_group,
        data_timeout_s=TIMEOUT_S,
        digest_share=0.0,
    )
    num_blocks = 2 * (max(args.prompt) // BLOCK_SIZE + 2)
    pool = PoolConfig(num_blocks=num_blocks, max_num_batched_tokens=mode.chunk)
    model = ModelConfig(path=str(folder / "model"), name="bench")
    specs = [spec for role in Role for spec in replica_ranks(f"{role.value}0", role, model, pool, transfer, BLOCK_SIZE)]
    ranks = [RankProcess(spec, folder, slow_link=link) for spec in specs]
    scheduler = SchedulerConfig(local_prefill_max_tokens=0)
    async with rank_processes(ranks) as infos, control_plane(scheduler, transfer, BLOCK_SIZE) as plane:
        for info in infos.values():
            plane.register(info)
        await plane.until_ready(len(ranks))
        yield Fleet(plane, {info.role: info for info in infos.values()}, link)


async def measure(args: argparse.Namespace, mode: Mode, fleet: Fleet) -> tuple[list[Row], HandoffTimeline]:
    """All lengths and shares; the last of the longest prompts, too."""
    rng = random.Random(args.seed)
    rows = []
    for length in args.prompt:

        async def hand_off(name: str, speed: Speed, length: int = length) -> HandoffTimeline:
            prompt = [rng.randrange(SHAPES[args.shape].vocab_size) for _ in range(length)]
            return await fleet.hand_off(f"{mode.name}-{length}-{name}", prompt, speed)

        free = [await hand_off(f"free-{i}", UNLIMITED) for i in range(args.repeats + (length == args.prompt[0]))]
        compute_s = min(timeline.compute_s for timeline in free)
        for share in args.share:
            speed = Speed(free[0].num_bytes / compute_s / share, args.latency)
            seen = [await hand_off(f"{share:g}-{i}", speed) for i in range(args.repeats)]
            rows.append(summarise(mode, length, share, seen))
    return rows, seen[-1]


def summarise(mode: Mode, length: int, share: float, seen: Sequence[HandoffTimeline]) -> Row:
    """Medians."""
    return Row(
        mode.name,
        length,
        share,
        statistics.median(timeline.compute_s for timeline in seen),
        statistics.median(timeline.wire_s for timeline in seen),
        statistics.median(timeline.exposed_s for timeline in seen),
        statistics.median(timeline.least_exposed_s for timeline in seen),
        statistics.median(timeline.hidden_share for timeline in seen),
        statistics.median(1 - timeline.least_exposed_s / timeline.wire_s for timeline in seen),
        sum(event.phase == "wire" for event in seen[0].decode),
        seen[0].num_bytes,
    )


async def run(args: argparse.Namespace, modes: Sequence[Mode]) -> tuple[list[Row], list[tuple[str, HandoffTimeline]]]:
    """All modes, one fleet after the other."""
    rows, timelines = [], []
    for mode in modes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_random_checkpoint(folder / "model", SHAPES[args.shape], args.seed)
            async with running_fleet(args, mode, folder) as fleet:
                found, last = await measure(args, mode, fleet)
        rows += found
        timelines.append((f"{max(args.prompt)} tokens, {mode.name}", last))
    return rows, timelines


def modes_of(args: argparse.Namespace) -> list[Mode]:
    """As configured, and with nothing to announce before all is computed."""
    num_layers = SHAPES[args.shape].num_layers
    overlapped = Mode("overlap", args.chunk, args.layers_per_group, args.last_layers_per_group)
    return [overlapped, Mode("none", max(args.prompt), num_layers, num_layers)]


def print_rows(rows: Sequence[Row]) -> None:
    """Milliseconds and MiB."""
    head = ("overlap", "prompt", "share", "compute ms", "wire ms", "exposed ms", "least", "hidden", "most", "MiB")
    print_table(
        head,
        [
            (
                row.mode,
                str(row.num_prompt_tokens),
                f"{row.share:g}",
                milliseconds(row.compute_s),
                milliseconds(row.wire_s),
                milliseconds(row.exposed_s),
                milliseconds(row.least_exposed_s),
                f"{row.hidden_share:.1%}",
                f"{row.most_hidden_share:.1%}",
                f"{row.num_bytes / 2**20:.1f}",
            )
            for row in rows
        ],
    )


def main() -> None:
    """Prints a table, the longest prompts' timelines and one JSON line."""
    args = parse()
    torch.set_num_threads(1)
    rows, timelines = asyncio.run(run(args, modes_of(args)))
    print_rows(rows)
    for name, timeline in timelines:
        print(f"\n{name}")
        print_timeline(timeline)
    if args.timeline is not None:
        plot_timelines(timelines, args.timeline)
    print_json("overlap", args, seed=args.seed, rows=[vars(row) for row in rows])


def parse() -> argparse.Namespace:
    """Options."""
    defaults = TransferConfig(), PoolConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny-long", help="random weights")
    parser.add_argument("--channel", default="shared_memory", help="what carries the bytes behind the wire")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512, 2048, 8192], help="tokens")
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of the wire's in compute time"
    )
    parser.add_argument("--latency", type=float, default=0.0002, help="seconds that the wire adds to each slab")
    parser.add_argument("--chunk", type=int, default=defaults[1].max_num_batched_tokens, help="tokens of a step")
    parser.add_argument("--layers-per-group", type=int, default=defaults[0].layers_per_group)
    parser.add_argument("--last-layers-per-group", type=int, default=defaults[0].last_layers_per_group)
    parser.add_argument("--repeats", type=int, default=3, help="requests of each kind")
    parser.add_argument("--timeline", type=Path, help="PNG of the last handoffs of the longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
