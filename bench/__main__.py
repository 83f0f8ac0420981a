"""All benchmarks one after another, with settings that end in about ten minutes on two cores; or one with its options.

python -m bench
python -m bench handoff --channel shared_memory
"""

import json
import runpy
import sys

from bench.report import conditions
from bench.steps import run_step, summary

BENCHMARKS = {
    "engine": ("--threads", "2"),
    "kv_transfer": ("--rounds", "3"),
    "handoff": ("--repeats", "5"),
    "overlap": (),
    "startup": (),
    "weights": ("--rounds", "1"),
    "http": ("--rounds", "2"),
    "autoscaling": (),
    "simulation": (),
    "reality": ("--rates", "3", "--rounds", "1", "--requests", "60", "--calibration-requests", "60"),
    "scheduler": ("--blocks", "1000000"),
}


def main() -> None:
    """Ends with one JSON line; exit status 1 when a benchmark failed."""
    if len(sys.argv) > 1:
        run_one(sys.argv[1])
        return
    began = conditions()
    steps = [run_step(name, (f"bench.{name}", *options)) for name, options in BENCHMARKS.items()]
    print(json.dumps({"benchmark": "all"} | began | {"results": summary(steps)}))
    sys.exit(any(step.status for step in steps))


def run_one(name: str) -> None:
    """In this process; the other arguments are its own."""
    if name not in BENCHMARKS:
        sys.exit(f"python -m bench [NAME ...]: NAME is one of {', '.join(BENCHMARKS)}, not {name}")
    del sys.argv[1]
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
