"""Fits kernels.json to tables of measured kernels, and says how far from them it is.

    python -m simulator.cost.fit_kernels TABLES      # a folder with aiconfigurator's h100_sxm_*.csv.gz and h200_sxm_*

Coefficients are the least squares of relative errors among those that are not negative, large errors damped.
"""

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from simulator.cost.gpu_spec import GPUS
from simulator.cost.kernel_times import context_attention_terms, expert_terms, generation_attention_terms
from simulator.cost.least_squares import not_negative

Row = dict[str, str]
Floats = NDArray[np.float64]

ROWS = (1, 16, 64, 128, 192, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192, 16384)
PRODUCTS = {"bfloat16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block"}
# Experts of the table by the name that we give them. Loads are skewed in practice: the milder one of the two measured.
# Of fp8 the second kernel is measured where whole experts are shared by ranks, the first where each is split.
FP8_KERNELS = ("vllm_fp8moe_triton_tritonexperts", "vllm_fp8moe_flashinfer_cutlass_flashinferexperts")
EXPERTS = {
    "bfloat16": ("bfloat16", ("vllm_unquantizedfusedmoe_triton_tritonexperts",)),
    "fp8": ("fp8_block", FP8_KERNELS),
    "fp8_block": ("fp8_block", FP8_KERNELS),
    "int4": ("int4_wo", ("vllm_compressedtensorswna16marlinmoe_marlin_marlinexperts",)),
    "mxfp4": ("w4a16_mxfp4", ("vllm_gptossmxfp4moe_triton_oaitritonmxfp4expertsmonolithic",)),
}
SKEW = "power_law_1.01"


def main(tables: Annotated[Path, typer.Argument(exists=True, file_okay=False)]) -> None:
    """Writes kernels.json beside this file."""
    found = {gpu: _fit_gpu(tables, gpu) for gpu in GPUS}
    Path(__file__).with_name("kernels.json").write_text(json.dumps(_plain(found)) + "\n")


def _fit_gpu(tables: Path, gpu: str) -> dict[str, Any]:
    def table(name: str) -> Iterable[Row]:
        (path,) = tables.glob(f"{gpu}_sxm_{name}")
        with gzip.open(path, "rt") as file:
            yield from csv.DictReader(file)

    typer.echo(f"{gpu}: median and 90th percentile of relative errors")
    return {
        "products": _fit_products(list(table("gemm_*"))),
        "context": _fit_attention(table("*_context_attention_perf.csv.gz"), _context_row),
        "generation": _fit_attention(table("*_generation_attention_perf.csv.gz"), _generation_row),
        "experts": _fit_experts(list(table("moe_*"))),
        "all_reduce": _fit_all_reduce(table("comm_*_custom_allreduce_perf.csv.gz")),
    }


def _fit_products(rows: list[Row]) -> dict[str, Any]:
    """Layers of models: at least a million weights."""
    points: defaultdict[tuple[str, int], list[tuple[float, ...]]] = defaultdict(list)
    for row in rows:
        m, n, k = (int(row[name]) for name in ("m", "n", "k"))
        if m in ROWS and min(n, k) >= 128 and n * k >= 2**20:
            points[row["gemm_dtype"], m].append((n * k, n, k, 1.0, _seconds(row)))
    found: dict[str, Any] = {}
    for name, dtype in PRODUCTS.items():
        fits = [_fit(f"{name} product of {m} rows", points[dtype, m]) for m in ROWS]
        per_nk, per_n, per_k, fixed = zip(*fits, strict=True)
        if name == "fp8_block":  # measured with the host's launches in it, which captured graphs do not pay
            fixed = tuple(min(ours, other) for ours, other in zip(fixed, found["fp8"]["fixed"], strict=True))
        found[name] = {"rows": ROWS, "per_nk": per_nk, "per_n": per_n, "per_k": per_k, "fixed": fixed}
    return found


def _fit_attention(rows: Iterable[Row], terms: Callable[[Row, int], Sequence[float]]) -> dict[int, Floats]:
    points: defaultdict[int, list[tuple[float, ...]]] = defaultdict(list)
    name = ""
    for row in rows:
        if row["kv_cache_dtype"] == "bfloat16" and row["window_size"] == "0":
            name, head_dim = row["op_name"], int(row["head_dim"])
            points[head_dim].append((*terms(row, head_dim), _seconds(row)))
    return {size: _fit(f"{name}, heads of {size}", points[size]) for size in sorted(points)}


def _context_row(row: Row, head_dim: int) -> Sequence[float]:
    batch, num_tokens, context = (int(row[name]) for name in ("batch_size", "isl", "step"))
    return context_attention_terms(
        batch, num_tokens, context, int(row["num_heads"]), int(row["num_key_value_heads"]), head_dim
    )


def _generation_row(row: Row, head_dim: int) -> Sequence[float]:
    batch, heads, kv_heads = (int(row[name]) for name in ("batch_size", "num_heads", "num_key_value_heads"))
    return generation_attention_terms(batch, int(row["isl"]) + int(row["step"]), heads, kv_heads, head_dim)


def _fit_experts(rows: list[Row]) -> dict[str, Any]:
    found = {}
    for name, (dtype, kernels) in EXPERTS.items():
        points: defaultdict[int, list[tuple[float, ...]]] = defaultdict(list)
        for row in rows:
            if row["moe_dtype"] == dtype and row["kernel_source"] in kernels and row["distribution"] == SKEW:
                sizes = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
                tokens, hidden, inner, per_token, experts, split, ranks = (int(row[size]) for size in sizes)
                terms = expert_terms(name, tokens, hidden, inner // split, per_token, experts, ranks)
                points[tokens].append((*terms, _seconds(row)))
        fits = [_fit(f"{name} experts of {num} tokens", points[num]) for num in TOKENS]
        found[name] = {"rows": TOKENS, "coefficients": fits}
    return found


def _fit_all_reduce(rows: Iterable[Row]) -> dict[int, Floats]:
    """Those of captured graphs, up to 64 MiB."""
    points: defaultdict[int, list[tuple[float, ...]]] = defaultdict(list)
    for row in rows:
        num_bytes = 2 * int(row["message_size"])
        if row["backend"] == "vllm_graph" and num_bytes <= 2**26:
            points[int(row["num_gpus"])].append((1.0, num_bytes, _seconds(row)))
    return {ranks: _fit(f"all-reduce of {ranks}", points[ranks]) for ranks in sorted(points)}


def _fit(name: str, points: Sequence[Sequence[float]]) -> Floats:
    """Rows of (terms..., seconds) -> coefficients."""
    table = np.array(points, dtype=np.float64)
    relative = table[:, :-1] / table[:, -1:]
    scale = relative.max(axis=0)
    weights = np.ones(len(table))
    for _ in range(9):
        coefficients = not_negative(relative / scale * weights[:, None], weights)
        errors = relative / scale @ coefficients - 1
        weights = np.maximum(np.abs(errors), 0.03) ** -0.5
    median, p90 = np.quantile(np.abs(errors), (0.5, 0.9))
    typer.echo(f"  {name:34} {len(table):6} points {median:6.1%} {p90:6.1%}")
    fitted: Floats = coefficients / scale
    return fitted


def _seconds(row: Row) -> float:
    return float(row["latency"]) / 1000


def _plain(value: Any) -> Any:
    """Six digits are more than the fit is worth."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, np.ndarray)):
        return [_plain(item) for item in value]
    return value if isinstance(value, int) else float(f"{value:.6g}")


if __name__ == "__main__":
    typer.run(main)
