"""A fleet on five hosts, from a cluster file of ray_configs: handoff between hosts, and hosts and services that fail.

Host 0 is the head, 1 and 2 have the prefill pool, 3 and 4 the decode pool. The hosts are namespaces of this machine.
"""

import json

from tests.hosts.load import Load, until
from tests.hosts.testbed import NUM_HOSTS, TWO_OF_EACH, Fleet, write_serve_file

WHOLE_AGAIN_S = 60.0


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
    assert fleet.ready() == {"prefill": [1, 2], "decode": [3, 4]}


def test_the_front_is_on_the_head(fleet):
    """So that no other host that fails takes clients' connections or the scheduler with it."""
    fronts = {host: sum("baton:" in name for name in fleet.hosts.processes(host)) for host in range(NUM_HOSTS)}
    assert fronts == {0: 2, 1: 0, 2: 0, 3: 0, 4: 0}, "ingress and scheduler"


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
    file = write_serve_file(fleet.hosts, TWO_OF_EACH, ("v1", "v2"))
    load = Load(fleet, expected, 6)
    fleet.on_head(f"baton deploy {file}", timeout_s=180)
    assert answered_by(fleet) == {"v1"}, "a new generation gets nothing until it is told to"
    assert fleet.baton("traffic", "v1=50", "v2=50", "--url", fleet.url).strip() == "v1 50 %, v2 50 %"
    load.until_done(24)
    assert answered_by(fleet) == {"v1", "v2"}
    fleet.baton("traffic", "--back", "--url", fleet.url)
    load.until_done(6)
    fleet.on_head(f"baton deploy {write_serve_file(fleet.hosts, TWO_OF_EACH)}", timeout_s=180)
    until(fleet.is_whole, WHOLE_AGAIN_S, "the first generation alone")
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
    seconds = until(fleet.is_whole, WHOLE_AGAIN_S, "a whole fleet")
    load.until_done(6)
    seen = load.finish()
    print(f"\ncut off: {seen}; whole {seconds:.1f} s after the link was back")
    assert (seen.errors, seen.wrong) == ([], [])


def test_the_heads_gcs_is_killed_and_comes_back(fleet, expected):
    load = Load(fleet, expected, 6)
    load.until_done(6)
    fleet.hosts.on(0, "pkill -KILL gcs_server")
    load.until_done(18)
    seconds = until(fleet.is_whole, WHOLE_AGAIN_S, "a whole fleet")
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
        lambda: fleet.is_whole() and fleet.status()["scheduler_id"] != scheduler, WHOLE_AGAIN_S, "another scheduler"
    )
    seen = load.finish()
    print(f"\nscheduler killed: {seen}; whole after {seconds:.1f} s")
    assert (seen.errors, seen.wrong) == ([], [])
