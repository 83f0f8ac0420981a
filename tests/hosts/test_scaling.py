"""Both pools follow a load that rises fivefold and falls, within one budget, over hosts."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bench.timeline import Point, plot_timeline
from tests.hosts.conftest import answers_to
from tests.hosts.load import Load, until
from tests.hosts.testbed import NUM_HOSTS, fleet_from, running_hosts, write_cluster_file, write_serve_file

RESULTS = Path(__file__).parents[2] / "bench" / "results"
BUDGET = 4  # of six replicas that the pools may have
AUTOSCALING = {
    "policy": "slo", "max_gpus": BUDGET, "interval_s": 1, "upscale_delay_s": 2, "downscale_delay_s": 15,
    "downscale_pause_s": 2, "replica_start_s": 15, "rate_window_s": 5, "ttft_target_s": 0.5, "itl_target_s": 0.5,
    "prefill_utilization": 0.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def fleet():
    pool = {"min_replicas": 1, "max_replicas": 3, "drain_timeout_s": 2, "max_num_seqs": 4}
    changes = {
        "prefill": pool | {"num_blocks": 80}, "decode": pool | {"num_blocks": 160}, "autoscaling": AUTOSCALING,
        "scheduler": {"local_prefill_max_tokens": 0},
    }  # fmt: skip
    with running_hosts(NUM_HOSTS) as hosts:
        cluster_file = write_cluster_file(hosts, NUM_HOSTS, prefill_hosts=(1, 2))
        with fleet_from(hosts, cluster_file, write_serve_file(hosts, changes)) as fleet:
            yield fleet


@pytest.fixture(scope="module")
def expected_of_many() -> dict[str, list[int]]:
    """More long prompts than the prefill pool's caches hold, so that every request is work for both pools."""
    sentence = "the ship went on before the wind, and no one on board had a word to say of what they had seen. "
    return answers_to([f"Letter {i}, of the year {1700 + 7 * i}: {sentence * 12}" for i in range(24)])


def test_the_fleet_grows_and_shrinks_with_the_load_and_no_request_fails(fleet, expected_of_many):
    timeline: list[Point] = []
    started = time.monotonic()

    def sizes() -> tuple[int, int]:
        status = fleet.status()
        ready = [r["info"]["role"] for r in status["replicas"] if not r["status"]["draining"]]
        now = ready.count("prefill"), ready.count("decode")
        wanted = {size["role"]: size["num_replicas"] for size in status["sizes"]}
        at_s, requests = round(time.monotonic() - started, 1), status["num_waiting"] + status["num_reserved"]
        targets = wanted.get("prefill", 1), wanted.get("decode", 1)
        timeline.append(Point(at_s, now[0], targets[0], now[1], targets[1], requests))
        return now

    few = Load(fleet, expected_of_many, 1)
    few.until_done(4)
    assert sizes() == (1, 1)
    many = Load(fleet, expected_of_many, 4)  # with the one: five times as many
    until(lambda: min(sizes()) >= 2, 180, "both pools to grow")
    more = many.num_done + 24
    until(lambda: sizes() and many.num_done >= more, 120, "24 more answers")
    crowd = many.finish()
    until(lambda: sizes() == (1, 1), 180, "the fleet to shrink")
    calm = few.finish()
    print("\nseconds: prefill and decode replicas ready, wanted; requests")
    for before, now in pairwise(timeline):
        if replace(now, at_s=0, load=0) != replace(before, at_s=0, load=0):
            print(f"{now.at_s:.0f}: {now.prefill_ready} {now.decode_ready}, {now.prefill_target} {now.decode_target}; "
                  f"{now.load:.0f}")  # fmt: skip
    plot_timeline(timeline, "requests", RESULTS / "hosts_scaling.png")
    for seen in (crowd, calm):
        print(seen)
        assert (seen.errors, seen.wrong) == ([], [])
    assert max(point.prefill_ready + point.decode_ready for point in timeline) <= BUDGET
    assert max(point.prefill_target + point.decode_target for point in timeline) <= BUDGET
