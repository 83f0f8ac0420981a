"""The twin checked against ourselves: the same requests on a real fleet on CPU and in the simulator, figure by figure.

Bound: a ratio twin / real of 1, as far as plays of the same load on the real fleet agree with each other. The real
fleet has one rank a replica, no Ray and no HTTP; an open-loop client shares a process with scheduler and orchestrator.

Loads are played in real time, one after another, C P C P C: P is what is compared, C calibrate, at the same rate with
other requests and with placements forced in turns (see bench/reality_calibration.py). The very same requests go to two
twins: one is told what the C before and after it measured, the other what the steps of P itself took. Where the first
is wrong and the second is not, the machine was another one meanwhile; where both are, the twin is.

Steps take the time of a device beside which cores are idle (bench/paced_rank.py); `--pace 0` has them take the CPU's
own, which on few cores is what is left by the other ranks, the client and strangers. Medians over the rounds count.

    python -m bench.reality --rates 1.5 3 --rounds 3
    python -m bench.reality --pace 0 --rates 3
    python -m bench.reality --trace TRACE.jsonl.gz --requests 150 --rates 1
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.reality_calibration import Calibration, calibrate
from bench.reality_fleet import Played, RealFleet, real_fleet
from bench.reality_load import fitted, poisson_load
from bench.reality_report import Compared, as_json, compare, figures_of_real, figures_of_twin, print_compared
from bench.report import print_json
from cluster.settings import demo_model_path
from core.config import ModelConfig, PoolConfig, RankResources, SchedulerConfig, TransferConfig
from core.kv_layout import KVLayout
from core.messages.fleet import ReplicaInfo, Role
from engine.checkpoint import load_model_spec
from simulator.fleet_spec import DeviceFacts, FleetSpec
from simulator.traces.readers import read_trace
from simulator.traces.trace import TracedRequest
from simulator.twin import Twin

FORCED = ("auto", "pair", "auto", "local")  # placements while calibrating, so that all kinds of steps are seen
WARM_UP = 24  # requests


@dataclass(frozen=True)
class Round:
    """One play, and the two twins that were told what was measured around it and in it."""

    real: dict[str, float]
    foretold: dict[str, float]
    retold: dict[str, float]
    foreign_cores: float


class RealityBench:
    """What both fleets have in common."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._checkpoint = demo_model_path()
        self._model = load_model_spec(self._checkpoint, args.dtype)
        self._scheduler = SchedulerConfig(itl_slo_s=args.itl_slo_s)
        self._transfer = TransferConfig(channel="shared_memory")
        self._pool = PoolConfig(
            num_blocks=args.num_blocks,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.chunk,
            resources_per_rank=RankResources(num_threads=1),
        )

    async def run(self, folder: Path) -> dict[float, list[Round]]:
        """By rate."""
        args = self._args
        numbers = {Role.PREFILL: args.prefill, Role.DECODE: args.decode}
        model = ModelConfig(path=str(self._checkpoint), name="bench", dtype=args.dtype)
        vocab_size = self._model.vocab_size
        found = dict[float, list[Round]]()
        sizes = args.block_size, vocab_size
        pace = args.pace or None
        async with real_fleet(
            numbers, self._pool, model, self._scheduler, self._transfer, *sizes, folder, pace
        ) as fleet:
            await fleet.play(poisson_load(WARM_UP, args.rates[0], args.seed), FORCED)
            for rate in args.rates:
                found[rate] = await self._rounds(fleet, rate)
                print_compared(f"{rate:g} requests/s", *_compared(found[rate]))
        return found

    async def _rounds(self, fleet: RealFleet, rate: float) -> list[Round]:
        """C P C P C: P is the same load each time, C is another one each time."""
        args, rounds = self._args, list[Round]()
        load = self._load(rate)

        async def measure(number: int) -> Played:
            return await fleet.play(poisson_load(args.calibration_requests, rate, args.seed + 1 + number), FORCED)

        before = await measure(0)
        for number in range(args.rounds):
            played, after = await fleet.play(load), await measure(number + 1)
            told = calibrate([before, after])
            rounds.append(await asyncio.to_thread(self._round, fleet.infos[0], load, played, told))
            before = after
        return rounds

    def _round(self, info: ReplicaInfo, load: list[TracedRequest], played: Played, around: Calibration) -> Round:
        within = calibrate([played], around)
        specs = [self.spec(info, one) for one in (around, within)]
        slo = specs[0].slo
        foretold, retold = (
            figures_of_twin(Twin(spec, dict(one.costs), seed=self._args.seed).run(load), slo)
            for spec, one in zip(specs, (around, within), strict=True)
        )
        _tell(around, within, played)
        return Round(figures_of_real(played.seen, slo), foretold, retold, played.foreign_cores)

    def _load(self, rate: float) -> list[TracedRequest]:
        args = self._args
        if args.trace is None:
            return poisson_load(args.requests, rate, args.seed)
        trace = read_trace(args.trace, seed=args.seed)[: args.requests]
        return fitted(trace, min(self._model.max_model_len, args.longest), rate)

    def spec(self, info: ReplicaInfo, calibration: Calibration) -> FleetSpec:
        """The twin's fleet: the real one's configuration, what its replicas tell of themselves, what was measured."""
        args = self._args
        pool = {
            "num_blocks": args.num_blocks,
            "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": args.chunk,
            "step_gap_s": calibration.step_gap_s,
        }
        return FleetSpec.model_validate(
            {
                "model": "bench",
                "kv": _kv(info.layout, info.max_model_len),
                "device": {name: getattr(info, name) for name in DeviceFacts._fields},
                "block_size": args.block_size,
                "prefill": pool | {"replicas": args.prefill} if args.prefill else None,
                "decode": pool | {"replicas": args.decode},
                "link": asdict(calibration.link),
                "layers_per_group": self._transfer.layers_per_group,
                "control_latency_s": calibration.control_latency_s,
                "scheduler": self._scheduler,
                "transfer": self._transfer,
                "slo": {"ttft_s": args.slo_ttft_s, "tpot_s": args.slo_tpot_s},
            }
        )


def _kv(layout: KVLayout, max_model_len: int) -> dict[str, object]:
    return {
        "num_layers": layout.num_layers,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "dtype": layout.dtype,
        "max_model_len": max_model_len,
    }


def _compared(rounds: Sequence[Round]) -> tuple[Compared, Compared]:
    real = [one.real for one in rounds]
    return compare(real, [one.foretold for one in rounds]), compare(real, [one.retold for one in rounds])


def _tell(around: Calibration, within: Calibration, played: Played) -> None:
    wrong = sorted({seen.error for seen in played.seen if seen.error})
    print(f"others used {played.foreign_cores:.2f} cores; errors {wrong}", file=sys.stderr)
    for name, one in (("around", around), ("within", within)):
        print(f"  {name}: {one.describe()}", file=sys.stderr)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="recorded load, shrunk to the model's context; else a Poisson one")
    parser.add_argument("--requests", type=int, default=100, help="of each load")
    parser.add_argument("--calibration-requests", type=int, default=80)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5, 3.0], help="requests/s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pace", type=float, default=2.0, help="of steps, see bench.paced_rank; 0: the CPU's own")
    parser.add_argument("--prefill", type=int, default=1, help="replicas")
    parser.add_argument("--decode", type=int, default=1, help="replicas")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-blocks", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of one step")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a recorded request after shrinking")
    parser.add_argument("--itl-slo-s", type=float, default=0.2, help="that the scheduler keeps; its default is 0.1")
    parser.add_argument("--slo-ttft-s", type=float, default=0.5)
    parser.add_argument("--slo-tpot-s", type=float, default=0.06)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    """Prints a table for each rate and one JSON line."""
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(RealityBench(args).run(Path(name)))
    results = [
        {"rate": rate, "foreign_cores": [one.foreign_cores for one in rounds]}
        | {name: as_json(one) for name, one in zip(("foretold", "retold"), _compared(rounds), strict=True)}
        for rate, rounds in found.items()
    ]
    print_json("reality", args, seed=args.seed, results=results)


if __name__ == "__main__":
    main()
