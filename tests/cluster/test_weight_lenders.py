"""Whom a new replica asks for its weights."""

import random
from dataclasses import replace

from cluster.weight_lenders import weight_lenders
from core.config import PoolConfig
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import ReplicaState, ReplicaStatus

TWO_RANKS = PoolConfig(tensor_parallel=2)
IDLE = ReplicaStatus(0, 0, 0, 8, 0, False, 0.0, 0.0, 0)


def replica(
    name: str, zone: str = "a", ranks: int = 2, model: str = "m", draining: bool = False, stages: int = 1
) -> ReplicaState:
    info = ReplicaInfo(
        name,
        Role.DECODE,
        1,
        tuple(f"{name}:{rank}" for rank in range(ranks)),
        KVLayout(2, 2, 8, 16, "float32", ranks // stages, pipeline_parallel=stages),
        Compatibility(model, "r", "float32", 16, "h"),
        8,
        4,
        64,
        128,
        zone=zone,
    )
    return ReplicaState(info, replace(IDLE, draining=draining), 0.0)


def lenders(*replicas: ReplicaState, seed: int = 0, pool: PoolConfig = TWO_RANKS) -> tuple[tuple[str, ...], ...]:
    return weight_lenders(replicas, "m", pool, "a", random.Random(seed))


def test_each_rank_asks_ranks_of_its_own_number_its_zone_first():
    for seed in range(10):
        first, second = lenders(replica("far", zone="b"), replica("near"), seed=seed)
        assert (first, second) == (("near:0", "far:0"), ("near:1", "far:1"))


def test_other_models_other_degrees_and_those_that_leave_are_not_asked():
    others = (replica("x", model="n"), replica("y", ranks=1), replica("z", draining=True), replica("s", stages=2))
    assert lenders(*others) == ((), ())
    assert lenders(*others, pool=PoolConfig(pipeline_parallel=2)) == (("s:0",), ("s:1",)), "stages have other shares"


def test_many_replicas_that_start_at_once_ask_different_ones():
    fleet = [replica(f"r{number}") for number in range(20)]
    asked_first = {lenders(*fleet, seed=seed)[0][0] for seed in range(40)}
    assert len(asked_first) > 10
    assert len(lenders(*fleet)[0]) == 3
