"""A node that its provider takes back: replicas move, streams go on, the node ends by itself."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.local import LOOPBACK, free_port
from cluster.node_drain import drain_node, find_node
from cluster.settings import DEMO_MODEL_NAME, demo_model_path
from core.config import parse_config
from core.errors import InvalidParameter
from tests.cluster.test_application import NUM_TOKENS, PROMPTS, Load, client_of, resumes_of, stream_tokens

SWITCHES = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
}


def node(name: str, *, alive: bool = True, head: bool = False) -> dict:
    resources = {"node:__internal_head__": 1.0} if head else {}
    return {
        "NodeID": f"{name}-id", "NodeManagerAddress": f"{name}-address", "NodeManagerHostname": "same",
        "Alive": alive, "Resources": resources,
    }  # fmt: skip


NODES = [node("head", head=True), node("a"), node("b"), node("dead", alive=False)]


@pytest.mark.parametrize("wanted", ["a-id", "a-address"])
def test_a_node_is_found_by_id_and_address(wanted):
    assert find_node(wanted, NODES) is NODES[1]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("same", "3 nodes"), ("dead-id", "0 nodes"), ("head-address", "is the head")],
)
def test_only_one_live_worker_node_can_be_meant(wanted, says):
    with pytest.raises(InvalidParameter, match=says):
        find_node(wanted, NODES)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Decode runs on `worker`; `cluster.add_node` can make room elsewhere."""
    before = {name: os.environ.get(name) for name in SWITCHES}
    os.environ.update(SWITCHES)
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from cluster import deployments
    from cluster.names import FRONT_NAME, pools_name
    from cluster.readiness import wait_until_ready

    config = parse_config(
        {
            "model": {"path": str(demo_model_path()), "name": DEMO_MODEL_NAME, "dtype": "float32"},
            "prefill": {"num_blocks": 256, "resources_per_rank": {"custom": {"prefill": 1}}},
            "decode": {"num_blocks": 256, "resources_per_rank": {"custom": {"decode": 1}}, "drain_timeout_s": 0},
            "cluster": {"address": "auto", "secret": "s", "log_dir": str(tmp_path_factory.mktemp("logs"))},
        }
    )
    log_dir = Path(config.cluster.log_dir)
    port = free_port()
    head = {"num_cpus": 4, "resources": {"prefill": 1}, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(http_options={"host": LOOPBACK, "port": port, "location": "HeadOnly"})
        serve.run_many(
            [serve.RunTarget(deployments.front(config), FRONT_NAME, "/")]
        )  # on the head, nothing else is there
        worker = cluster.add_node(num_cpus=2, resources={"decode": 1}, object_store_memory=100 * 2**20)
        pools = deployments.pools(config)
        serve.run_many([serve.RunTarget(pools, pools_name(config.generation), None, external_scaler_enabled=True)])
        url = f"http://{LOOPBACK}:{port}"
        wait_until_ready(url, lambda _: None, 60)
        yield SimpleNamespace(url=url, cluster=cluster, worker=worker, log_dir=log_dir)
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@pytest.mark.cluster
@pytest.mark.timeout(300)
async def test_a_drained_node_costs_no_stream_and_ends(fleet):
    import ray

    client = client_of(fleet)
    undisturbed = [await stream_tokens(client, prompt, NUM_TOKENS) for prompt in PROMPTS]
    fleet.cluster.add_node(num_cpus=2, resources={"decode": 1}, object_store_memory=100 * 2**20)
    (leaving,) = fleet.log_dir.glob("decode-*-rank0.log")
    load = Load(client, undisturbed, 6)
    await load.until_done(4)
    drain_node(fleet.worker.node_id, deadline_s=120.0, reason="a test")
    async with asyncio.timeout(120):
        while fleet.worker.node_id in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            await asyncio.sleep(0.2)
    await load.until_done(load.num_done + 4)
    await load.finish()
    log = leaving.read_text()
    assert "requests over" in log and "drained, nothing is held" in log
    assert resumes_of(fleet) > 0, "streams of the replica that went were to be handed over"
    assert len(list(fleet.log_dir.glob("decode-*-rank0.log"))) == 2, "one replacement, on the new node"
