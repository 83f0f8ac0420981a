"""Configurations that the goodput benchmark tunes each policy over, equally many for all. Pure.

A configuration is a split of the GPUs between prefill and decode (colocated: all decode, which computes prompts in
chunks beside its batches), the tokens of a step, and a value of the policy's own knob where it has one. Who has none
tries further splits instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.goodput_loads import Slo
from core.config import SchedulerConfig
from core.slo_config import SloConfig, SloTarget
from simulator.baselines.catalog import MakePolicy, find_policy
from simulator.baselines.dynamo import Dynamo
from simulator.baselines.llm_d import LlmD
from simulator.baselines.mooncake import Mooncake
from simulator.fleet_spec import FleetSpec

BLOCK = 128
REPORT_S = 0.25
TENSOR_PARALLEL = {"llama-3.1-8b": 1, "llama-3.1-70b": 4}


@dataclass(frozen=True)
class Shape:
    """`prefill_share` of the replicas prefill, none in a colocated fleet. `knob` "": the policy as it is published."""

    prefill_share: float
    num_chunk_tokens: int
    knob: str = ""

    @property
    def is_colocated(self) -> bool:
        """No pool for prefill."""
        return self.prefill_share == 0.0

    def __str__(self) -> str:
        split = "colocated" if self.is_colocated else f"{self.prefill_share:.0%} prefill"
        return f"{split}, steps of {self.num_chunk_tokens}" + (f", {self.knob}" if self.knob else "")


def _dynamo(spec: FleetSpec, _: int) -> Dynamo:
    return Dynamo(spec.scheduler.max_decode_kv_usage, scale=2.0)


def _mooncake(spec: FleetSpec, _: int) -> Mooncake:
    return Mooncake(spec.scheduler.max_decode_kv_usage, spec.link.port.bytes_per_s, threshold=1.25)


def _llm_d(spec: FleetSpec, _: int) -> LlmD:
    stale_s = max(0.2, 2 * spec.report.quiet_interval_s)
    return LlmD(spec.scheduler.max_decode_kv_usage, stale_s, threshold=2048)


KNOBS: Mapping[str, tuple[str, MakePolicy]] = {
    "dynamo": ("overlap weight 2", _dynamo),
    "mooncake": ("fetch threshold 1.25", _mooncake),
    "llm-d": ("remote from 2048 tokens", _llm_d),
}
SPLITS = tuple(Shape(share, 8192) for share in (0.25, 0.375, 0.5, 0.625, 0.75))
COLOCATED = (Shape(0.0, 8192), Shape(0.0, 2048))
FURTHER = Shape(0.125, 8192)
NUM_CONFIGS = len(SPLITS) + len(COLOCATED) + 1


def configurations(policy: str) -> list[Shape]:
    """NUM_CONFIGS of them."""
    last = Shape(0.5, 8192, KNOBS[policy][0]) if policy in KNOBS else FURTHER
    return [*COLOCATED, *SPLITS, last]


def make_policy(policy: str, shape: Shape) -> MakePolicy:
    """With its knob as the configuration has it."""
    return KNOBS[policy][1] if shape.knob else find_policy(policy)


def fleet(model: str, num_gpus: int, shape: Shape, slo: Slo) -> FleetSpec:
    """H100s, joined by InfiniBand. The scheduler is told the SLO; who would wait beyond it for a plan is refused."""
    tp = TENSOR_PARALLEL[model]
    num_replicas = num_gpus // tp
    num_prefill = 0 if shape.is_colocated else min(num_replicas - 1, max(1, round(num_replicas * shape.prefill_share)))
    pool = {"max_num_batched_tokens": shape.num_chunk_tokens, "tensor_parallel": tp}
    target = SloTarget(ttft_s=slo.ttft_s, itl_s=slo.tpot_s)
    scheduler = SchedulerConfig(
        itl_slo_s=slo.tpot_s, slo=SloConfig(standard=target), queue_timeout_s=slo.ttft_s, queue_limit=100_000
    )
    return FleetSpec.model_validate(
        {
            "model": model,
            "gpu": "h100",
            "block_size": BLOCK,
            "prefill": pool | {"replicas": num_prefill, "max_num_seqs": 16} if num_prefill else None,
            "decode": pool | {"replicas": num_replicas - num_prefill, "max_num_seqs": 256},
            "report": {"interval_s": REPORT_S},
            "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
            "scheduler": scheduler,
        }
    )
