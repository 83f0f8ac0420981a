"""Costs that can be added up by hand, and small fleets that use them."""

import numpy as np

from core.messages.fleet import Role
from simulator.cost.cost_model import StepWork
from simulator.fleet_spec import FleetSpec
from simulator.traces.trace import Run, TracedRequest


class AffineCost:
    """base + so much per prompt token, per decoding sequence and per token of their context."""

    def __init__(
        self, base_s: float = 0.008, prompt_s: float = 1e-4, decode_s: float = 1e-4, context_s: float = 1e-8
    ) -> None:
        self.base_s, self.prompt_s, self.decode_s, self.context_s = base_s, prompt_s, decode_s, context_s

    def step_s(self, work: StepWork) -> float:
        num_prompt = sum(num_tokens for num_tokens, _ in work.chunks)
        fixed = self.base_s + self.prompt_s * num_prompt + self.decode_s * work.num_decoding
        return fixed + self.context_s * work.num_kv_tokens

    def decode_steps_s(self, num_decoding: int, num_kv_tokens):
        fixed = self.base_s + self.prompt_s * 0 + self.decode_s * num_decoding
        return fixed + self.context_s * num_kv_tokens.astype(np.float64)


COSTS = {role: AffineCost() for role in Role}
KV = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 8, "max_model_len": 4096}


def small_fleet(num_prefill: int = 1, num_decode: int = 1, **changes) -> FleetSpec:
    pool = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    tree = {
        "kv": KV,
        "model": "small",
        "block_size": 4,
        "prefill": pool | {"replicas": num_prefill} if num_prefill else None,
        "decode": pool | {"replicas": num_decode},
        "link": {"bytes_per_s": 1e6, "latency_s": 0.001},
    }
    for path, value in changes.items():
        *outer, last = path.split("__")
        section = tree
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
    return FleetSpec.model_validate(tree)


def traced(number: int, arrival_s: float, prompt: tuple[int, ...], num_output: int, **more) -> TracedRequest:
    runs = tuple(Run(token, 1) for token in prompt)
    output = tuple(Run(1000 + (number + index) % 7, 1) for index in range(num_output))
    return TracedRequest(f"r{number}", arrival_s, runs, output, **more)
