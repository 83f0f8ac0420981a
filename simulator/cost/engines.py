"""What engines add to their kernels, as `check_costs` found from measured runs. Pure."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from simulator.cost.gpu_cost_model import EngineOverhead

DEFAULT_ENGINE = "vllm"  # stands for ours, which has not been measured on a GPU yet


@cache
def engine_overhead(engine: str) -> EngineOverhead:
    """Of an engine by name: vllm (before 0.14), vllm-0.14+, trtllm or sglang."""
    found: Any = json.loads(files("simulator.cost").joinpath("engines.json").read_text())[engine]
    return EngineOverhead(found["step_s"], found["sequence_s"])
