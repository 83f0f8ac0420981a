"""Fleets of H100s with Llama 3.1 8B, and loads whose prompts share what they are told to share."""

import random
from collections import Counter
from collections.abc import Iterable

import numpy as np

from core.messages.fleet import Role
from simulator.cost.gpus import gpu_cost_model
from simulator.fleet_spec import FleetSpec
from simulator.records import Record
from simulator.traces.trace import Run, TracedRequest
from simulator.twin import Twin

COSTS = {role: gpu_cost_model("h100", "llama-3.1-8b", 1) for role in Role}
TTFT_S, TPOT_S = 1.0, 0.05


def h100_fleet(num_prefill: int, num_decode: int, **changes) -> FleetSpec:
    pool = {"num_blocks": 6000, "max_num_seqs": 128, "max_num_batched_tokens": 4096}
    tree = {
        "prefill": pool | {"replicas": num_prefill, "max_num_seqs": 16},
        "decode": pool | {"replicas": num_decode},
        "link": {"kind": "infiniband"},
        "report": {"interval_s": 0.1, "quiet_interval_s": 0.5},
    }
    return FleetSpec.model_validate(tree | changes)


def load(
    name: str,
    per_s: float,
    seconds: float,
    *,
    start: float = 0.0,
    num_shared: int = 2048,
    share: float = 0.3,
    num_output: tuple[int, int] = (20, 200),
    slo_class: str = "standard",
) -> list[TracedRequest]:
    """Poisson arrivals of a tenant of this name. `share` of its prompts begin with the same `num_shared` tokens, the
    others with as many of their own; 200 to 1500 tokens follow.
    """
    chance = random.Random(name)
    tenant = sum(name.encode())
    now, requests = start, list[TracedRequest]()
    while (now := now + chance.expovariate(per_s)) < start + seconds:
        own = 2**20 * tenant + 4 * len(requests)
        beginning = Run(tenant, num_shared) if chance.random() < share else Run(own, num_shared)
        prompt = (beginning, Run(own + 1, chance.randint(200, 1500)))
        output = (Run(own + 2, chance.randint(*num_output)),)
        requests.append(TracedRequest(f"{name}{len(requests)}", now, prompt, output, tenant=name, slo_class=slo_class))
    return requests


def play(spec: FleetSpec, *loads: list[TracedRequest]) -> list[Record]:
    requests = [request for one in loads for request in one]
    return Twin(spec, COSTS, seed=1).run(sorted(requests, key=lambda r: (r.arrival_s, r.request_id))).records


def goodput(records: Iterable[Record], tpot_s: float = TPOT_S) -> float:
    """Of all arrivals, those answered whole and within both targets."""
    good = [record.meets(TTFT_S, tpot_s) for record in records]
    return sum(good) / len(good)


def ttft_p99(records: Iterable[Record]) -> float:
    return float(np.quantile([record.ttft_s for record in records if record.is_completed], 0.99))


def shares(names: Iterable[str]) -> dict[str, float]:
    counted = Counter(names)
    return {name: count / counted.total() for name, count in counted.items()}
