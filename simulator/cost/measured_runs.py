"""Rows of aiconfigurator's table of measured end-to-end runs, as far as the cost model can say something of them.

Rows of two sources multiply the ranks of a replica by those that share its experts: 34 runs of one of these are listed
in a third one, with equal figures and the ranks that they had. Runs that are listed twice stay twice.
"""

import csv
import gzip
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "MiniMaxAI/MiniMax-M2.5": "minimax-m2",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
}
PRECISIONS = {"": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "mxfp4", "int4_wo": "int4"}
BLOCKWISE = ("deepseek-v3", "qwen3-235b-a22b", "minimax-m2")  # published in fp8 with a scale for each 128 x 128 weights
PUBLIC = re.compile(r"db-dump|source_file=2026|gap-analysis")  # sources of rows of InferenceMAX's public campaign
MULTIPLIED = re.compile(r"db-dump|source_file=2026-04-06")

Row = Mapping[str, str]


@dataclass(frozen=True)
class Split:
    """How one replica's GPUs share its model; see GpuCostModel."""

    tensor_parallel: int
    expert_parallel: int = 1
    data_parallel: int = 1


@dataclass(frozen=True)
class PrefillSide:
    """Of a disaggregated run: replicas that compute prompts, for so many that decode."""

    split: Split
    num_prefill: int
    num_decode: int


@dataclass(frozen=True)
class MeasuredRun:
    """N clients of one shape of requests."""

    model: str
    gpu: str
    engine: str
    precision: str
    split: Split  # of what decodes
    num_clients: int
    num_prompt_tokens: int
    num_output_tokens: int
    ttft_s: float
    tpot_s: float
    is_public: (
        bool  # measured by InferenceMAX: ten requests per client, sizes between 0.8 of the nominal ones and these
    )
    prefill: PrefillSide | None = None

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What errors are told by."""
        return self.engine, self.model, self.gpu, self.precision


def read_runs(path: Path, left_out: Counter[str]) -> Iterator[MeasuredRun]:
    """Rows that can be modelled; why the others were not is counted in `left_out`."""
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    replicas = {_figures(row): row for row in rows if row["decode_num_workers"]}
    for row in rows:
        reason = _why_not(row)
        if not reason and row["mode"] == "disagg":
            row = replicas.get(_figures(row), row)
            if not row["decode_num_workers"] and row["backend"] == "trtllm":
                reason = "disaggregated: how many replicas decode is not told"
        if reason:
            left_out[reason] += 1
        else:
            yield _run(row)


def _figures(row: Row) -> tuple[str, ...]:
    """Rows of one run agree in these, up to the last digits that files keep."""
    return row["isl"], row["osl"], row["silicon_ttft_ms"][:12], row["silicon_tpot_ms"][:12]


def _why_not(row: Row) -> str:
    if row["model_path"] not in MODELS:
        return f"model of another architecture: {row['model_path']}"
    if row["mode"] == "agg":
        split = _split(row)
        if split.tensor_parallel * split.data_parallel > 8:
            return "experts over several hosts"
    return ""


def _run(row: Row) -> MeasuredRun:
    model = MODELS[row["model_path"]]
    precision = PRECISIONS[row["gemm_quant_mode"]]
    prefill, prefix = None, ""
    if row["mode"] == "disagg":
        prefill = PrefillSide(
            _split(row, "prefill_"), _number(row["prefill_num_workers"]), _number(row["decode_num_workers"])
        )
        prefix = "decode_"
    return MeasuredRun(
        model,
        row["system"].removesuffix("_sxm"),
        _engine(row),
        "fp8_block" if precision == "fp8" and model in BLOCKWISE else precision,
        _split(row, prefix),
        _clients(row),
        _number(row["isl"]),
        _number(row["osl"]),
        float(row["silicon_ttft_ms"]) / 1000,
        float(row["silicon_tpot_ms"]) / 1000,
        bool(PUBLIC.search(row["silicon_data_source"])),
        prefill,
    )


def _split(row: Row, prefix: str = "") -> Split:
    tensor, data, split, shared = (
        max(1, _number(row[prefix + name])) for name in ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    )
    if MULTIPLIED.search(row["silicon_data_source"]) and min(split, shared) > 1:
        return Split(max(1, tensor // shared), shared, max(1, data // shared))
    if split * shared > tensor * data:  # attention is replicated, though its column is empty
        data = split * shared // tensor
    return Split(tensor, shared, data)


def _clients(row: Row) -> int:
    """Of the whole run: batches of some rows are those of one rank or of one replica."""
    told = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
    if told:
        return int(told[1])
    if row["mode"] == "disagg":
        return _number(row["decode_batch_size"]) * _number(row["decode_num_workers"])
    return _number(row["batch_size"])


def _engine(row: Row) -> str:
    """vLLM schedules ahead of the GPU since 0.14; runs that tell no version are older."""
    version = row["backend_version"].split(".")
    if row["backend"] != "vllm":
        return row["backend"]
    return "vllm-0.14+" if len(version) > 1 and (int(version[0]), int(version[1])) >= (0, 14) else "vllm"


def _number(text: str) -> int:
    return int(float(text)) if text else 1
