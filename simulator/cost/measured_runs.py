"""Rows of aiconfigurator's table of measured end-to-end runs, as far as the cost model can say something of them."""

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
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


@dataclass(frozen=True)
class MeasuredRun:
    """N clients of one shape of requests on one replica."""

    model: str
    gpu: str
    engine: str
    precision: str
    tensor_parallel: int
    expert_parallel: int
    num_clients: int
    num_prompt_tokens: int
    num_output_tokens: int
    ttft_s: float
    tpot_s: float

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What errors are told by."""
        return self.engine, self.model, self.gpu, self.precision


def read_runs(path: Path, left_out: Counter[str]) -> Iterator[MeasuredRun]:
    """Rows that can be modelled; why the others were not is counted in `left_out`."""
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            reason = _why_not(row)
            if reason:
                left_out[reason] += 1
            else:
                yield _run(row)


def _why_not(row: dict[str, str]) -> str:
    if row["mode"] != "agg":
        return "disaggregated: TTFT holds the wait at a load that the row does not tell"
    if row["model_path"] not in MODELS:
        return f"model of another architecture: {row['model_path']}"
    if _number(row["attention_dp_size"]) > 1:
        return "attention split by sequences over ranks"
    if _number(row["tp_size"]) > 8 or _number(row["pp_size"]) > 1:
        return "replicas of several hosts"
    if _number(row["moe_ep_size"]) > _number(row["tp_size"]):
        return "experts over several hosts"
    return ""


def _run(row: dict[str, str]) -> MeasuredRun:
    return MeasuredRun(
        MODELS[row["model_path"]],
        row["system"].removesuffix("_sxm"),
        _engine(row),
        PRECISIONS[row["gemm_quant_mode"]],
        _number(row["tp_size"]),
        max(1, _number(row["moe_ep_size"])),
        _number(row["batch_size"]),
        _number(row["isl"]),
        _number(row["osl"]),
        float(row["silicon_ttft_ms"]) / 1000,
        float(row["silicon_tpot_ms"]) / 1000,
    )


def _engine(row: dict[str, str]) -> str:
    """vLLM schedules ahead of the GPU since 0.14; runs that tell no version are older."""
    version = row["backend_version"].split(".")
    if row["backend"] != "vllm":
        return row["backend"]
    return "vllm-0.14+" if len(version) > 1 and (int(version[0]), int(version[1])) >= (0, 14) else "vllm"


def _number(text: str) -> int:
    return int(float(text)) if text else 1
