"""Small fleets under random loads: nothing is lost or left, runs repeat to the bit, and skipping changes nothing."""

import os
import random
import subprocess
import sys
from dataclasses import asdict

import pytest

from simulator.baselines.catalog import find_policy
from simulator.decode_replica import DecodeReplica
from simulator.fleet_spec import FleetSpec
from simulator.traces.trace import TracedRequest
from simulator.twin import Result, Twin
from tests.simulator.costs import COSTS, small_fleet, traced

FLEETS = {
    "pairs": small_fleet(2, 2, scheduler__local_prefill_max_tokens=4),
    "one of each, little memory": small_fleet(1, 1, decode__num_blocks=22, prefill__num_blocks=24),
    "colocated": small_fleet(0, 3),
    "colocated, little memory": small_fleet(0, 2, decode__num_blocks=20),
    "windows": small_fleet(
        2,
        2,
        kv={
            **{"num_layers": 4, "num_kv_heads": 2, "head_dim": 8, "max_model_len": 4096},
            "windows": [None, 6, None, 6],
        },
        decode__num_blocks=40,
    ),
    "slow links": small_fleet(3, 2, link__bytes_per_s=2e4),
    "two ingresses, impatient": small_fleet(2, 2, num_ingresses=2, clients__timeout_s=0.15),
    "short queue": small_fleet(1, 1, scheduler__queue_timeout_s=0.3, scheduler__queue_limit=6),
    "gaps between steps": small_fleet(2, 2, prefill__step_gap_s=0.0013, decode__step_gap_s=0.0007),
    "pulls": small_fleet(3, 2, scheduler__pull_min_tokens=4, link__bytes_per_s=1e8),
}


def random_trace(seed: int, num_requests: int = 60, per_s: float = 60.0) -> list[TracedRequest]:
    """Sessions and shared beginnings; some moments at which several come at once."""
    chance = random.Random(seed)
    beginnings = [tuple(chance.randrange(50) for _ in range(chance.randrange(4, 30))) for _ in range(4)]
    now, requests = 0.0, []
    for number in range(num_requests):
        now += 0.0 if chance.random() < 0.2 else chance.expovariate(per_s)
        rest = tuple(chance.randrange(50) for _ in range(chance.randrange(1, 24)))
        prompt = (chance.choice(beginnings) if chance.random() < 0.7 else ()) + rest
        requests.append(traced(number, now, prompt, chance.randrange(1, 30)))
    return requests


def play(spec: FleetSpec, trace: list[TracedRequest], *, seed: int = 1, skips: bool = True) -> tuple[Twin, Result]:
    twin = Twin(spec, COSTS, seed=seed, skips=skips)
    return twin, twin.run(trace)


def everything(result: Result) -> object:
    """All that a run says, but for how many events it took."""
    sampler = result.sampler
    pools = {role: [asdict(point) for point in points] for role, points in sampler.pools.items()}
    return [asdict(r) for r in result.records], pools, [asdict(p) for p in sampler.fleet], result.num_transfer_bytes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FLEETS)
def test_skipping_quiet_steps_changes_no_record(name, seed):
    trace = random_trace(seed)
    _, skipped = play(FLEETS[name], trace)
    _, stepped = play(FLEETS[name], trace, skips=False)
    assert repr(everything(skipped)) == repr(everything(stepped))
    assert skipped.num_events < stepped.num_events


@pytest.mark.parametrize("seed", range(4))
def test_skipping_changes_no_record_where_prefixes_go_between_full_replicas(seed):
    """Blocks are lent, and taken for what is borrowed, while both ends have steps computed ahead."""
    spec = small_fleet(0, 3, decode__num_blocks=20, link__bytes_per_s=1e5, scheduler__max_decode_kv_usage=1.0)
    mooncake = find_policy("mooncake")
    skipped, stepped = (
        Twin(spec, COSTS, seed=1, make_policy=mooncake, skips=skips).run(random_trace(seed)) for skips in (True, False)
    )
    assert repr(everything(skipped)) == repr(everything(stepped))
    assert skipped.num_transfer_bytes > 0
    assert any(record.num_attempts > 1 for record in skipped.records)  # blocks ran out


@pytest.mark.parametrize("name", FLEETS)
def test_every_arrival_has_one_outcome_and_nothing_is_left(name):
    trace = random_trace(7)
    twin, result = play(FLEETS[name], trace)
    assert sorted(r.request_id for r in result.records) == sorted(r.request_id for r in trace)
    lengths = {request.request_id: request.num_output_tokens for request in trace}
    for record in result.records:
        assert record.num_output_tokens == lengths[record.request_id] or not record.is_completed
    assert len(twin.scheduler.admission.reservations) == twin.scheduler.admission.num_waiting == 0
    for replica in twin.fleet.replicas.values():
        assert replica.is_idle
        assert replica.host.pool.num_held == replica.host.pool.num_promised == 0
        replica.host.pool.validate()
    assert len(twin.world.network) == 0


def test_the_same_seed_repeats_to_the_bit():
    trace = random_trace(3)
    assert repr(everything(play(FLEETS["pairs"], trace)[1])) == repr(everything(play(FLEETS["pairs"], trace)[1]))


def test_books_balance_after_every_event():
    for name in ("one of each, little memory", "windows", "pulls"):
        twin = Twin(FLEETS[name], COSTS, seed=1)
        goes_on = twin._goes_on

        def checked(twin=twin, goes_on=goes_on) -> bool:
            for replica in twin.fleet.replicas.values():
                books = replica.handoffs if isinstance(replica, DecodeReplica) else replica.deliveries
                books.validate()
            return goes_on()

        twin._goes_on = checked
        assert len(twin.run(random_trace(5, num_requests=25)).records) == 25


def test_other_processes_hash_strings_otherwise_and_find_the_same():
    probe = (
        "from hashlib import sha256; from tests.simulator.test_whole_fleets import *;"
        "found = [everything(play(FLEETS[name], random_trace(9))[1]) for name in ('pairs', 'pulls', 'colocated')];"
        "print(sha256(repr(found).encode()).hexdigest())"
    )
    digests = {
        subprocess.check_output([sys.executable, "-c", probe], text=True, env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1
