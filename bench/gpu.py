"""One command for a machine with CUDA and without Ray: tests, engine, handoff; tables and figures go into a folder.

    python -m bench.gpu OUTPUT_FOLDER

Ray is hidden from every process, so that what runs here needs none. A handoff between GPUs needs two of them, or one
and a torch whose NCCL lets two ranks share it (2.30 and later); otherwise it is left out, and the summary says so.
Exit status 1 when anything failed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.random_checkpoint import SHAPES
from bench.report import conditions
from bench.steps import Step, run_step, summary

TESTS = ("tests/engine", "tests/kv_transfer", "tests/fleet")
ENGINE_SIZES = {
    "cuda": ("--decode", "1", "64", "--prompt", "1024", "--prefill", "8192"),
    "cpu": ("--decode", "1", "4", "--prefill", "128"),
}
HANDOFF_SIZES = {
    "cuda": ("--prompt", "128", "512", "1024", "2048", "--chunk", "2048"),
    "cpu": ("--prompt", "128", "--repeats", "3"),
}
SHARED_GPU_NCCL = (2, 30)
NO_RAY = 'raise ImportError("Ray is hidden: engine, workers and transfer do without it")\n'


@contextmanager
def hidden_ray() -> Iterator[dict[str, str]]:
    """Environment of processes in which `import ray` fails."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder, "ray")
        stub.mkdir()
        (stub / "__init__.py").write_text(NO_RAY)
        yield {"PYTHONPATH": os.pathsep.join((folder, *filter(None, sys.path)))}


def why_no_handoff(device: str) -> str:
    """Empty when ranks can reach each other."""
    if device == "cpu" or torch.cuda.device_count() > 1:
        return ""
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    if version >= SHARED_GPU_NCCL:
        return ""
    return f"one GPU, and NCCL {'.'.join(map(str, version))} refuses two ranks on it"


def run_all(args: argparse.Namespace, environment: dict[str, str]) -> Iterator[Step]:
    """Every step; a failed one does not keep the others from running."""
    if not args.skip_tests:
        yield run_step("tests", ("pytest", *TESTS, "-m", "not soak", "-rfEs"), environment)
    on_device = ("--dtype", "bfloat16", "--device", args.device)
    for shape in args.shapes:
        options = ("--shape", shape, *on_device, *ENGINE_SIZES[args.device], "--by", *ways(args.device))
        yield run_step(f"engine-{shape}", ("bench.engine", *options), environment)
    if args.device == "cuda":
        options = ("--shape", "8b", *on_device, "--decode", "1", "64", "--prefill", "2048", "--prompt", "256")
        streamed = ("--device-weights-mib", "8192", "--repeats", "1", "--output", "8", "--by", ways("cuda")[0])
        yield run_step("engine-8b-streamed", ("bench.engine", *options, *streamed), environment)
    if not why_no_handoff(args.device):
        for shape in args.shapes:
            options = ("--shape", shape, *on_device, *HANDOFF_SIZES[args.device])
            yield run_step(f"handoff-{shape}", ("bench.handoff", *options), environment)
        options = ("--shape", args.shapes[0], *on_device, *HANDOFF_SIZES[args.device], "--repeats", "3")
        for degree in ("stages", "tensor"):
            step = f"handoff-{args.shapes[0]}-2-{degree}"
            yield run_step(step, ("bench.handoff", *options, f"--prefill-{degree}", "2"), environment)


def ways(device: str) -> tuple[str, ...]:
    """By what the engine can compute here."""
    has_flashinfer = device == "cuda" and find_spec("flashinfer") is not None
    return ("flashinfer", "graphs", "torch") if has_flashinfer else ("torch",)


def describe_device(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    told: dict[str, Any] = {"device": device, "torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        told["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        told["flashinfer"] = find_spec("flashinfer") is not None
        told["cuda"] = torch.version.cuda
        told["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return told


def write(folder: Path, steps: Sequence[Step], told: dict[str, Any]) -> None:
    """One text file for each step and one summary."""
    for step in steps:
        (folder / f"{step.name}.txt").write_text(step.output)
    (folder / "summary.json").write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    """Runs everything, writes after every step, and ends with the summary as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the tables; made if it is missing")
    parser.add_argument("--device", choices=ENGINE_SIZES, default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["160m", "8b"])
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here")
    args.folder.mkdir(parents=True, exist_ok=True)
    began = {"benchmark": "gpu"} | conditions() | describe_device(args.device)
    skipped = why_no_handoff(args.device)
    if skipped:
        began["handoff"] = f"not run: {skipped}"
        print(f"handoff not run: {skipped}")
    steps: list[Step] = []
    with hidden_ray() as environment:
        for step in run_all(args, environment):
            steps.append(step)
            write(args.folder, steps, began | {"results": summary(steps)})
    print(json.dumps(began | {"results": summary(steps)}))
    sys.exit(any(step.status for step in steps))


if __name__ == "__main__":
    main()
