"""Brings one rank's engine up: reads the weights, meets the replica's other ranks, warms up."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint import load_model_spec
from engine.kv_cache import decide_num_blocks
from engine.model_spec import ModelSpec
from engine.runner import ModelRunner
from engine.tensor_parallel import connect_ranks
from worker.rank_weights import RankWeights
from worker.spec import RankSpec


@dataclass(frozen=True)
class LoadedEngine:
    """A rank's model, ready to step."""

    spec: ModelSpec
    runner: ModelRunner


def load_engine(spec: RankSpec, weights: RankWeights) -> LoadedEngine:
    """Blocks until weights are in place and the first step has run. Raises ConfigurationError, PeerLost."""
    pool = spec.pool
    device = torch.device(pool.device)
    model = load_model_spec(Path(spec.model.path), pool.dtype or spec.model.dtype, spec.model.max_model_len)
    layout = model.kv_layout(pool.tensor_parallel, spec.block_size)
    num_blocks = decide_num_blocks(model, layout, device, pool.num_blocks, pool.kv_cache_mib, pool.memory_fraction)
    group = connect_ranks(spec.store_address, spec.rank, pool.tensor_parallel, device, spec.group_host)
    num_threads = pool.resources_per_rank.num_threads
    with weights.reading(model, layout) as read:
        runner = ModelRunner(model, read, layout, num_blocks, group, device, num_threads, pool.whole_experts)
    if spec.rank == 0:
        runner.warm_up()
    return LoadedEngine(model, runner)
