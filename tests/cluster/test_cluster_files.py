"""Every file of ray_configs is what Ray, Serve, KubeRay and our own configuration accept. Nothing is started."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.names import FRONT_NAME, pools_name
from core.config import BatonConfig, parse_config
from core.serve_file import application_args

FOLDER = Path(__file__).parent.parent.parent / "ray_configs"
CLUSTERS = sorted((FOLDER / "clusters").glob("*.yaml"))
SERVES = sorted((FOLDER / "serve").glob("*.yaml"))
KUBERAY = FOLDER / "kuberay" / "rayservice.yaml"
ALL = [*CLUSTERS, *SERVES, KUBERAY, FOLDER / "node.sh"]


def by_name(file: Path) -> str:
    return file.name


def configuration(serve_tree: dict) -> BatonConfig:
    """Through Serve's schema and ours."""
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(serve_tree)
    return parse_config(application_args(serve_tree))


def test_nothing_is_missing():
    assert [f.stem for f in CLUSTERS] == ["aws_p5", "azure_nd_h100_v5", "gcp_a3", "on_premise"]
    assert [f.stem for f in SERVES] == ["fleet_16_nodes", "laptop_cpu", "one_node_8xh100", "two_nodes"]


@pytest.mark.parametrize("file", ALL, ids=by_name)
def test_files_are_short_and_name_only_files_that_exist(file):
    text = file.read_text()
    assert len(text.splitlines()) < 80
    assert max(map(len, text.splitlines())) <= 120
    assert not re.search(r"<[a-z]|TODO|XXX|CHANGE_?ME|\$\{\{", text)
    for path in re.findall(r"ray_configs/[a-z0-9_/]+\.(?:yaml|sh)", text):
        assert (FOLDER.parent / path).is_file(), path


@pytest.mark.parametrize("file", CLUSTERS, ids=by_name)
def test_a_cluster_file_passes_rays_own_validation(file):
    from ray.autoscaler._private.util import prepare_config, validate_config

    tree = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(tree)
    stop, start = tree["worker_start_ray_commands"]
    assert stop.endswith("node.sh stop") and "node.sh worker" in start
    assert tree["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("file", [f for f in CLUSTERS if f.stem != "on_premise"], ids=by_name)
def test_a_cloud_has_a_node_type_for_each_pool(file):
    types = yaml.safe_load(file.read_text())["available_node_types"]
    assert types.keys() == {"head", "prefill", "decode"}
    for pool in ("prefill", "decode"):
        resources = types[pool]["resources"]
        assert (resources["GPU"], resources[pool], resources["accelerator_type:H100"]) == (8, 8, 1)
    assert types["prefill"]["node_config"] == types["decode"]["node_config"]


@pytest.mark.parametrize("file", SERVES, ids=by_name)
def test_a_serve_config_passes_serves_schema_and_ours(file):
    tree = yaml.safe_load(file.read_text())
    config = configuration(tree)
    front, pools = tree["applications"]
    assert (front["name"], front["route_prefix"]) == (FRONT_NAME, "/")
    assert (pools["name"], pools["route_prefix"]) == (pools_name(config.generation), None)
    assert pools["external_scaler_enabled"] is True and front["args"] == pools["args"]
    assert tree["http_options"] == {"host": config.ingress.host, "port": config.ingress.port}


def test_kubernetes_offers_what_the_pools_of_its_manifest_ask_for():
    manifest = yaml.safe_load(KUBERAY.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    config = configuration(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert (config.prefill.tensor_parallel, config.decode.tensor_parallel) == (4, 4)
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        offered = yaml.safe_load(yaml.safe_load(groups[name]["rayStartParams"]["resources"]))
        assert offered == {name: 8} and pool.resources_per_rank.custom == {name: 1}
        (container,) = groups[name]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        assert {v["name"] for v in container["volumeMounts"]} == {"models", "shm"}


def test_the_readme_says_of_every_file_whether_it_was_run():
    table = (FOLDER.parent / "README.md").read_text()
    for file in [*CLUSTERS, *SERVES, KUBERAY]:
        (row,) = [line for line in table.splitlines() if line.startswith("|") and file.name in line]
        assert row.endswith("not run |") or "` runs it" in row
