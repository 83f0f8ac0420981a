"""How fast the digital twin plays a load on large fleets: simulated requests and tokens per second of processor time.

Bound: one processor core. Block hashes are true ones, so that each prompt must be spelt out and hashed at least once;
`of limit` is how much longer the whole simulation takes than that alone, measured in the same run. Processor time is
what counts, so that others on the machine do not.

Conversations like those of Mooncake's published trace: 8 thousand tokens in, 340 out, nearly half of the requests go on
with an earlier one. The load grows with the fleet, and so does the number of requests: the same time is simulated.

    python -m bench.simulation
    python -m bench.simulation --replicas 64 256 1000 --requests 100000
"""

import argparse
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from resource import RUSAGE_SELF, getrusage
from time import process_time

from bench.report import print_json, print_table
from core.block_hash import hash_blocks
from simulator.baselines.catalog import POLICIES, find_policy
from simulator.command import gpu_costs, rare_collections
from simulator.fleet_spec import FleetSpec
from simulator.traces.trace import Run, TracedRequest, encoded, expand, own_token
from simulator.twin import Twin

BLOCK = 64
SYSTEM = Run(1, 400)  # a prompt that all conversations begin with
PREFILL_SHARE = 0.375
LONGEST = 100_000  # tokens of a prompt


@dataclass(frozen=True)
class Speed:
    """Of one fleet."""

    num_replicas: int
    num_requests: int
    cpu_s: float
    limit_s: float
    requests_per_s: float
    tokens_per_s: float
    simulated_s: float
    mean_ttft_s: float
    hit_rate: float
    peak_mib: int


def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 64], help="sizes of fleets")
    parser.add_argument("--requests", type=int, default=2000, help="of the smallest fleet; larger ones get more")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second for each replica")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="baton")
    parser.add_argument("--report-s", type=float, default=0.25, help="between two reports of a replica")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = []
    for num_replicas in args.replicas:
        num_requests = args.requests * num_replicas // args.replicas[0]
        load = list(conversations(num_requests, args.rate * num_replicas, args.seed))
        found.append(measure(fleet(num_replicas, args.report_s), load, args.policy, args.seed, num_replicas))
    head = ("replicas", "requests", "CPU s", "requests/s", "tokens/s", "ms each", "of limit", "hit rate", "MiB")
    print_table(
        head,
        [
            (
                str(one.num_replicas),
                str(one.num_requests),
                f"{one.cpu_s:.1f}",
                f"{one.requests_per_s:.0f}",
                f"{one.tokens_per_s:,.0f}",
                f"{one.cpu_s / one.num_requests * 1e3:.2f}",
                f"{one.cpu_s / one.limit_s:.1f}",
                f"{one.hit_rate:.0%}",
                str(one.peak_mib),
            )
            for one in found
        ],
    )
    print_json("simulation", args, fleets=[vars(one) | {"ratio_to_limit": one.cpu_s / one.limit_s} for one in found])


def measure(spec: FleetSpec, load: list[TracedRequest], policy: str, seed: int, num_replicas: int) -> Speed:
    """One run, and the limit on the same load."""
    began = process_time()
    for request in load:
        expand(request.prompt)
        hash_blocks(encoded(request.prompt), BLOCK)
    limit_s = process_time() - began
    twin = Twin(spec, gpu_costs(spec), seed=seed, make_policy=find_policy(policy))
    with rare_collections():
        began = process_time()
        result = twin.run(load)
        cpu_s = process_time() - began
    done = [record for record in result.records if record.is_completed]
    num_prompt = sum(record.num_prompt_tokens for record in done)
    num_tokens = num_prompt + sum(record.num_output_tokens for record in done)
    del twin
    gc.collect()
    return Speed(
        num_replicas,
        len(load),
        cpu_s,
        limit_s,
        len(load) / cpu_s,
        num_tokens / cpu_s,
        result.simulated_s,
        sum(record.ttft_s for record in done) / len(done),
        sum(record.num_cached_tokens for record in done) / num_prompt,
        getrusage(RUSAGE_SELF).ru_maxrss // 1024,
    )


def fleet(num_replicas: int, report_s: float) -> FleetSpec:
    """Llama 3.1 8B on H100s."""
    num_prefill = round(num_replicas * PREFILL_SHARE)
    pool = {"max_num_batched_tokens": 8192}
    return FleetSpec.model_validate(
        {
            "model": "llama-3.1-8b",
            "gpu": "h100",
            "block_size": BLOCK,
            "prefill": pool | {"replicas": num_prefill, "max_num_seqs": 16},
            "decode": pool | {"replicas": num_replicas - num_prefill, "max_num_seqs": 128},
            "report": {"interval_s": report_s},
        }
    )


def conversations(num_requests: int, per_s: float, seed: int) -> Iterator[TracedRequest]:
    """Poisson arrivals; lengths are log-normal, about as in the trace."""
    chance, now = Random(seed), 0.0
    open_ones: list[tuple[Run, ...]] = []  # all that was said in each conversation so far
    for number in range(num_requests):
        now += chance.expovariate(per_s)
        goes_on = bool(open_ones) and chance.random() < 0.45
        place = chance.randrange(len(open_ones)) if goes_on else len(open_ones)
        before = open_ones[place] if goes_on else (SYSTEM,)
        new = int(min(60_000, chance.lognormvariate(6.5 if goes_on else 8.4, 1.0))) + 16
        if sum(run.num_tokens for run in before) + new > LONGEST:
            before = (SYSTEM,)
        prompt = (*before, Run(own_token(2 * number), new))
        output = (Run(own_token(2 * number + 1), max(2, int(chance.lognormvariate(5.6, 0.7)))),)
        open_ones[place : place + 1] = [(*prompt, *output)]
        if len(open_ones) > 300 * per_s:
            del open_ones[0]
        yield TracedRequest(f"q{number}", now, prompt, output)


if __name__ == "__main__":
    main()
