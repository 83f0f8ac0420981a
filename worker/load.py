"""Brings one rank's engine up: reads the weights, meets the replica's other ranks, warms up."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from core.config import PoolConfig
from core.kv_budget import blocks_within, gpu_kv_bytes
from core.kv_layout import KVLayout
from engine.backend import choose_backend
from engine.checkpoint import load_model_spec
from engine.kv_cache import decide_num_blocks
from engine.model_spec import ModelSpec
from engine.rank_links import connect_ranks
from engine.runner import ModelRunner
from worker.rank_weights import RankWeights
from worker.spec import RankSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEngine:
    """A rank's model, ready to step. `warm_up_s`: what compilation, graphs and the first steps took; 0 of other ranks
    than the first.
    """

    spec: ModelSpec
    runner: ModelRunner
    warm_up_s: float


def load_engine(spec: RankSpec, weights: RankWeights) -> LoadedEngine:
    """Blocks until weights are in place and steps of all kinds have run. Raises ConfigurationError, PeerLost."""
    pool = spec.pool
    device = torch.device(pool.device)
    model = load_model_spec(Path(spec.model.path), pool.dtype or spec.model.dtype, spec.model.max_model_len)
    layout = model.kv_layout(pool.tensor_parallel, spec.block_size, pool.pipeline_parallel)
    backend = choose_backend(pool.engine, model, layout, device, pool.max_num_seqs)
    num_blocks = _num_blocks(pool, model, layout, device)
    links = connect_ranks(spec.store_address, spec.rank, layout, device, spec.group_host)
    num_threads = pool.resources_per_rank.num_threads
    with weights.reading(model, layout) as read:
        runner = ModelRunner(model, read, layout, num_blocks, links, device, num_threads, pool.whole_experts, backend)
    if spec.rank != 0:
        return LoadedEngine(model, runner, 0.0)
    started = time.monotonic()
    runner.warm_up(pool.max_num_batched_tokens if device.type == "cuda" else 0)
    warm_up_s = time.monotonic() - started
    logger.info("warm-up took %.1f s: %s", warm_up_s, backend.describe())
    return LoadedEngine(model, runner, warm_up_s)


def _num_blocks(pool: PoolConfig, model: ModelSpec, layout: KVLayout, device: torch.device) -> int:
    """As decided for all engines, but for a GPU with a budget for weights, which leaves the rest to KV."""
    budget_bytes = pool.engine.device_weight_bytes
    if device.type == "cpu" or budget_bytes is None or pool.num_blocks is not None:
        return decide_num_blocks(model, layout, device, pool.num_blocks, pool.kv_cache_mib, pool.memory_fraction)
    weight_bytes = min(budget_bytes, model.geometry.weight_bytes_per_rank(layout))
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    return blocks_within(layout, gpu_kv_bytes(memory_bytes, pool.memory_fraction, weight_bytes))
