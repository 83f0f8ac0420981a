"""Tokens per second through the whole path: HTTP, ingress, scheduler, prefill, handoff, decode, server-sent events.

Bound: the engines alone. Each stream sends its next request when the last one is answered, so a round of N requests
cannot be shorter than their prefills one after another, nor than one prefill and the decode steps that follow:

    tokens/s <= N * output / max(N / P * prefill_s, prefill_s + (output - 1) * step_s(N / D))    P, D: replicas

prefill_s and step_s are those of the same engine stepped in this process, without HTTP, measured in turns with the load
on the idle fleet. On a machine with fewer cores than ranks, ingress and client together, the ranks share what the bound
gives each of them alone: the ratio then tells as much about the machine as about the path.

    python -m bench.http --streams 1 8 32
    python -m bench.http --config ray_configs/serve/laptop_cpu.yaml --prefill 2 --decode 2
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.engine import generate, prompt_batch
from bench.http_client import LoadResult
from bench.report import ROOT, milliseconds, print_json, print_table
from cluster.local import free_port, local_fleet
from cluster.settings import resolve_config
from core.config import BatonConfig, PoolConfig
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.rank_links import RankLinks
from engine.runner import ModelRunner

WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class EngineTimes:
    """Of the engine alone, in seconds."""

    prefill_s: float  # one prompt
    step_s: float  # one decode step of one replica's share of the streams


@dataclass(frozen=True)
class Line:
    """Medians over the repeats; percentiles are of all requests and tokens of all repeats."""

    num_streams: int
    tokens_per_s: float
    bound_tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    engine: EngineTimes

    @property
    def ratio_to_bound(self) -> float:
        """1: HTTP, scheduling and handoffs cost nothing."""
        return self.tokens_per_s / self.bound_tokens_per_s


class BareEngine:
    """The same model in this process, stepped without anything around it."""

    def __init__(self, args: argparse.Namespace, config: BatonConfig) -> None:
        spec = load_model_spec(Path(config.model.path), config.decode.dtype or config.model.dtype)
        layout = spec.kv_layout(1, config.block_size)
        device = torch.device(config.decode.device)
        self.vocab_size = spec.vocab_size
        self._args = args
        self._num_decodes = config.decode.min_replicas
        blocks_each = layout.num_blocks_for(args.prompt + args.output) * len(layout.kv_groups)
        self._runner = ModelRunner(
            spec,
            CheckpointReader(Path(config.model.path), spec, device).read,
            layout,
            -(-max(args.streams) // self._num_decodes) * blocks_each,
            RankLinks(),
            device,
            config.decode.resources_per_rank.num_threads,
        )
        self._runner.warm_up()

    def measure(self, num_streams: int, rng: random.Random) -> EngineTimes:
        """Times of one run."""
        share = -(-num_streams // self._num_decodes)
        prompts = [[rng.randrange(self.vocab_size) for _ in range(self._args.prompt)] for _ in range(share)]
        batch = prompt_batch(prompts[:1], self._runner.layout, self._args.prompt)
        started = time.perf_counter()
        self._runner.collect(self._runner.launch(batch))
        prefill_s = time.perf_counter() - started
        return EngineTimes(prefill_s, generate(self._runner, prompts, self._args.output) / (self._args.output - 1))

    def close(self) -> None:
        """Frees the engine."""
        self._runner.close()


def bound_tokens_per_s(times: EngineTimes, num_streams: int, num_output: int, num_prefills: int) -> float:
    """See the module's docstring."""
    prefills_s = num_streams / num_prefills * times.prefill_s
    one_s = times.prefill_s + (num_output - 1) * times.step_s
    return num_streams * num_output / max(prefills_s, one_s)


def run_client(
    args: argparse.Namespace, url: str, model: str, vocab: int, streams: int, rounds: int, seed: int
) -> LoadResult:
    """One load, from another process. Raises CalledProcessError; its standard error is ours."""
    options = {
        "url": url, "model": model, "vocab": vocab, "streams": streams, "rounds": rounds,
        "prompt": args.prompt, "output": args.output, "seed": seed,
    }  # fmt: skip
    command = [sys.executable, "-m", "bench.http_client", *(f"--{name}={value}" for name, value in options.items())]
    told = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return LoadResult(**json.loads(told.stdout))


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of the others do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def summarise(
    args: argparse.Namespace,
    config: BatonConfig,
    streams: int,
    loads: Sequence[LoadResult],
    times: Sequence[EngineTimes],
) -> Line:
    """Medians and percentiles of one number of streams."""
    engine = EngineTimes(
        statistics.median(one.prefill_s for one in times), statistics.median(one.step_s for one in times)
    )
    ttft_s, itl_s = [s for load in loads for s in load.ttft_s], [s for load in loads for s in load.itl_s]
    return Line(
        streams,
        statistics.median(load.num_tokens / load.elapsed_s for load in loads),
        bound_tokens_per_s(engine, streams, args.output, max(1, config.prefill.min_replicas)),
        percentile(ttft_s, 50),
        percentile(ttft_s, 99),
        percentile(itl_s, 50),
        percentile(itl_s, 99),
        engine,
    )


def measure(args: argparse.Namespace, config: BatonConfig) -> list[Line]:
    """All numbers of streams, on one fleet."""
    engine, rng = BareEngine(args, config), random.Random(args.seed)
    name, lines = config.model.name, []
    print("starting a fleet", file=sys.stderr)
    with local_fleet(config, lambda _: None) as fleet:
        seeds = iter(range(args.seed, sys.maxsize))
        for streams in args.streams:
            run_client(args, fleet.url, name, engine.vocab_size, streams, WARM_UP_ROUNDS, next(seeds))
            loads, times = [], []
            for _ in range(args.repeats):
                times.append(engine.measure(streams, rng))
                loads.append(run_client(args, fleet.url, name, engine.vocab_size, streams, args.rounds, next(seeds)))
            lines.append(summarise(args, config, streams, loads, times))
    engine.close()
    return lines


def fleet_config(args: argparse.Namespace) -> BatonConfig:
    """The configuration with as many replicas as asked for, on a free port."""
    config = resolve_config(args.config, args.model, free_port())

    def sized(pool: PoolConfig, count: int | None) -> PoolConfig:
        return pool if count is None else pool.model_copy(update={"min_replicas": count, "max_replicas": count})

    return config.model_copy(
        update={"prefill": sized(config.prefill, args.prefill), "decode": sized(config.decode, args.decode)}
    )


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML; without it, the laptop's")
    parser.add_argument("--model", type=Path, help="Hugging Face checkpoint folder; without it, the demo model")
    parser.add_argument("--prefill", type=int, default=1, help="replicas")
    parser.add_argument("--decode", type=int, default=1, help="replicas")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream and repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = fleet_config(args)
    lines = measure(args, config)
    dtype = config.decode.dtype or config.model.dtype or "its own dtype"
    print(f"{config.model.name} in {dtype}, prompts of {args.prompt} and outputs of {args.output} tokens")
    print_table(
        ("streams", "tokens/s", "bound", "of bound", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "engine's step ms"),
        [
            (
                str(line.num_streams),
                f"{line.tokens_per_s:.0f}",
                f"{line.bound_tokens_per_s:.0f}",
                f"{line.ratio_to_bound:.2f}",
                milliseconds(line.ttft_p50_s),
                milliseconds(line.ttft_p99_s),
                milliseconds(line.itl_p50_s),
                milliseconds(line.itl_p99_s),
                milliseconds(line.engine.step_s),
            )
            for line in lines
        ],
    )
    results = [asdict(line) | {"ratio_to_bound": line.ratio_to_bound} for line in lines]
    print_json("http", args, seed=args.seed, results=results)


if __name__ == "__main__":
    main()
