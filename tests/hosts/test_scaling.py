"""Both pools follow a load that rises fivefold and falls, within one budget, over hosts."""

import time

import pytest

from tests.hosts.load import Load, until
from tests.hosts.testbed import fleet_from, running_hosts, write_cluster_file, write_serve_file

NUM_HOSTS = 5
BUDGET = 3  # of four replicas that the hosts could hold: the pools cannot both have two
AUTOSCALING = {
    "policy": "slo", "max_gpus": BUDGET, "interval_s": 1, "upscale_delay_s": 2, "downscale_delay_s": 15,
    "downscale_pause_s": 2, "replica_start_s": 15, "rate_window_s": 5, "ttft_target_s": 0.5, "itl_target_s": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def fleet():
    pool = {"min_replicas": 1, "max_replicas": 2, "drain_timeout_s": 2, "max_num_seqs": 4}
    changes = {"prefill": pool, "decode": pool, "autoscaling": AUTOSCALING}
    with running_hosts(NUM_HOSTS) as hosts:
        cluster_file = write_cluster_file(hosts, NUM_HOSTS, prefill_hosts=(1, 2))
        with fleet_from(hosts, cluster_file, write_serve_file(hosts, changes)) as fleet:
            yield fleet


def test_the_fleet_grows_and_shrinks_with_the_load_and_no_request_fails(fleet, expected):
    timeline: list[tuple[float, int, int, int]] = []
    started = time.monotonic()

    def sizes() -> tuple[int, int]:
        status = fleet.status()
        ready = [r["info"]["role"] for r in status["replicas"] if not r["status"]["draining"]]
        now = ready.count("prefill"), ready.count("decode")
        timeline.append((round(time.monotonic() - started, 1), *now, status["num_waiting"] + status["num_reserved"]))
        return now

    few = Load(fleet, expected, 2)
    few.until_done(4)
    assert sizes() == (1, 1)
    many = Load(fleet, expected, 8)  # with the two: five times as many
    until(lambda: sum(sizes()) == BUDGET, 120, "the budget to be used")
    more = many.num_done + 24
    until(lambda: sizes() and many.num_done >= more, 120, "24 more answers")
    crowd = many.finish()
    until(lambda: sizes() == (1, 1), 180, "the fleet to shrink")
    calm = few.finish()
    print("\nseconds, prefill, decode, requests:")
    for row in timeline:
        print(*row)
    for seen in (crowd, calm):
        print(seen)
        assert (seen.errors, seen.wrong) == ([], [])
    assert max(prefill + decode for _, prefill, decode, _ in timeline) <= BUDGET
