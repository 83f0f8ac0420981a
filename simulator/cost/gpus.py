"""Costs of replicas on GPUs, by names. Pure."""

from core.kv_budget import blocks_within, gpu_kv_bytes
from core.kv_layout import KVLayout
from simulator.cost.engines import DEFAULT_ENGINE, engine_overhead
from simulator.cost.gpu_cost_model import GpuCostModel
from simulator.cost.gpu_spec import gpu_spec
from simulator.cost.kernel_times import EXPERT_BYTES
from simulator.cost.models import served_model


def gpu_cost_model(
    gpu: str, model: str, tensor_parallel: int, precision: str = "bfloat16", engine: str = DEFAULT_ENGINE
) -> GpuCostModel:
    """A replica of `tensor_parallel` GPUs. Raises ConfigurationError for unknown names, splits that do not fit."""
    overhead = engine_overhead(engine)
    return GpuCostModel(gpu_spec(gpu), served_model(model), tensor_parallel, precision, overhead)


def kv_layout(model: str, tensor_parallel: int, block_size: int) -> KVLayout:
    """Of a model by name, KV in bfloat16. Raises ConfigurationError when it cannot be split so."""
    return served_model(model).geometry.kv_layout(tensor_parallel, block_size)


def num_kv_blocks(
    gpu: str,
    model: str,
    tensor_parallel: int,
    block_size: int,
    precision: str = "bfloat16",
    memory_fraction: float = 0.9,
) -> int:
    """Blocks that fit beside the weights. Raises ConfigurationError when none do."""
    geometry = served_model(model).geometry
    weight_bytes = int(geometry.num_parameters * EXPERT_BYTES[precision]) // tensor_parallel
    layout = geometry.kv_layout(tensor_parallel, block_size)
    return blocks_within(layout, gpu_kv_bytes(gpu_spec(gpu).memory_bytes, memory_fraction, weight_bytes))
