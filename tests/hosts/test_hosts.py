"""A fleet on five hosts, from a cluster file of ray_configs: handoff between hosts, and hosts and services that fail.

Host 0 is the head, 1 and 2 have the prefill pool, 3 and 4 the decode pool. The hosts are namespaces of this machine.
"""

import json

import pytest

from tests.hosts.load import Load, until
from tests.hosts.testbed import Fleet, fleet_from, running_hosts, write_cluster_file, write_serve_file

NUM_HOSTS = 5
WHOLE_AGAIN_S = 60.0
POOLS = {"min_replicas": 2, "max_replicas": 2}


@pytest.fixture(scope="module")
def fleet():
    with running_hosts(NUM_HOSTS) as hosts:
        cluster_file = write_cluster_file(hosts, NUM_HOSTS, prefill_hosts=(1, 2))
        serve_file = write_serve_file(hosts, {"prefill": POOLS, "decode": POOLS})
        with fleet_from(hosts, cluster_file, serve_file) as fleet:
            yield fleet
        left = {host: hosts.processes(host) for host in range(NUM_HOSTS)}
        assert left == {host: [] for host in range(NUM_HOSTS)}, "`baton down` leaves no process"


def ready(fleet: Fleet) -> dict[str, list[int]]:
    """Hosts of the replicas that take work, by pool."""
    hosts: dict[str, list[int]] = {"prefill": [], "decode": []}
    for replica in fleet.status()["replicas"]:
        if not replica["status"]["draining"] and replica["silent_s"] < 3:
            hosts[replica["info"]["role"]].append(fleet.host_of(replica["info"]["replica_id"]))
    return {role: sorted(of_pool) for role, of_pool in hosts.items()}


def is_whole(fleet: Fleet) -> bool:
    try:
        return {role: len(hosts) for role, hosts in ready(fleet).items()} == {"prefill": 2, "decode": 2}
    except (AssertionError, KeyError):
        return False


def test_tokens_are_those_of_transformers_and_kv_crosses_the_bridge(fleet, expected):
    before = {host: fleet.hosts.num_bytes(host) for host in range(1, NUM_HOSTS)}
    load = Load(fleet, expected, 4)
    load.until_done(16)
    seen = load.finish()
    assert (seen.errors, seen.wrong) == ([], [])
    after = {host: fleet.hosts.num_bytes(host) for host in range(1, NUM_HOSTS)}
    links = [link for replica in fleet.status()["replicas"] for link in replica["status"]["links"]]
    moved = sum(link["num_bytes"] for link in links)
    sent = sum(after[host][1] - before[host][1] for host in (1, 2))
    received = sum(after[host][0] - before[host][0] for host in (3, 4))
    print(
        f"\nKV moved {moved} bytes over {len(links)} links; prefill hosts sent {sent}, decode hosts received {received}"
    )
    assert moved > 1e6 and sent > moved and received > moved
    assert "baton_link_bytes{destination=" in fleet.metrics()
    assert all(link["bytes_per_s"] > 0 for link in links)


def test_replicas_of_a_pool_are_spread_over_its_hosts(fleet):
    assert ready(fleet) == {"prefill": [1, 2], "decode": [3, 4]}


def test_the_doctor_finds_the_cluster_fit(fleet):
    found = json.loads(fleet.on_head("baton doctor --cluster auto --json"))
    failed = [finding for finding in walk(found) if finding.get("verdict") == "fail"]
    assert not failed, failed
    assert any("bandwidth" in finding["check"] for finding in walk(found))


def walk(tree):
    """Every mapping that looks like a finding."""
    if isinstance(tree, dict):
        if "check" in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from walk(item)


def test_traffic_moves_to_a_second_generation_and_back_without_an_error(fleet, expected):
    file = write_serve_file(fleet.hosts, {"prefill": POOLS, "decode": POOLS}, ("v1", "v2"))
    load = Load(fleet, expected, 6)
    fleet.on_head(f"baton deploy {file}", timeout_s=180)
    assert answered_by(fleet) == {"v1"}, "a new generation gets nothing until it is told to"
    assert fleet.baton("traffic", "v1=50", "v2=50", "--url", fleet.url).strip() == "v1 50 %, v2 50 %"
    load.until_done(24)
    assert answered_by(fleet) == {"v1", "v2"}
    fleet.baton("traffic", "--back", "--url", fleet.url)
    load.until_done(6)
    fleet.on_head(f"baton deploy {write_serve_file(fleet.hosts, {'prefill': POOLS, 'decode': POOLS})}", timeout_s=180)
    until(lambda: is_whole(fleet), WHOLE_AGAIN_S, "the first generation alone")
    load.until_done(6)
    seen = load.finish()
    print(f"\ntwo generations: {seen}")
    assert (seen.errors, seen.wrong) == ([], [])


def answered_by(fleet: Fleet) -> set[str]:
    """Generations whose decode replicas have taken a step."""
    replicas = fleet.status()["replicas"]
    return {r["info"]["generation"] for r in replicas if r["info"]["role"] == "decode" and r["status"]["num_steps"]}


def test_a_decode_host_is_cut_off_and_comes_back(fleet, expected):
    load = Load(fleet, expected, 6)
    load.until_done(6)
    fleet.hosts.script("cut", "4")
    load.until_done(12)
    fleet.hosts.script("heal", "4")
    seconds = until(lambda: is_whole(fleet), WHOLE_AGAIN_S, "a whole fleet")
    load.until_done(6)
    seen = load.finish()
    print(f"\ncut off: {seen}; whole {seconds:.1f} s after the link was back")
    assert (seen.errors, seen.wrong) == ([], [])


def test_the_heads_gcs_is_killed_and_comes_back(fleet, expected):
    load = Load(fleet, expected, 6)
    load.until_done(6)
    fleet.hosts.on(0, "pkill -KILL gcs_server")
    load.until_done(18)
    seconds = until(lambda: is_whole(fleet), WHOLE_AGAIN_S, "a whole fleet")
    seen = load.finish()
    print(f"\nGCS killed: {seen}; whole after {seconds:.1f} s")
    assert (seen.errors, seen.wrong) == ([], [])
    assert "gcs_server" in "\n".join(fleet.hosts.processes(0))


def test_the_scheduler_is_killed(fleet, expected):
    load = Load(fleet, expected, 6)
    load.until_done(6)
    scheduler = fleet.status()["scheduler_id"]
    fleet.hosts.on(0, "pkill -KILL -f [G]lobalScheduler")
    load.until_done(12)
    seconds = until(
        lambda: is_whole(fleet) and fleet.status()["scheduler_id"] != scheduler, WHOLE_AGAIN_S, "another scheduler"
    )
    seen = load.finish()
    print(f"\nscheduler killed: {seen}; whole after {seconds:.1f} s")
    assert (seen.errors, seen.wrong) == ([], [])


def test_a_decode_host_dies(fleet, expected):
    load = Load(fleet, expected, 6)
    load.until_done(6)
    fleet.hosts.script("kill", "4")
    load.until_done(12)
    seconds = until(lambda: is_whole(fleet), WHOLE_AGAIN_S, "its replica on another host")
    seen = load.finish()
    print(f"\nhost dead: {seen}; whole after {seconds:.1f} s")
    assert (seen.errors, seen.wrong) == ([], [])
    assert ready(fleet)["decode"] == [3, 3]
    fleet.hosts.script("revive", "4")  # so that `down` can see that nothing is left there
