"""The configuration tree: wrong files are refused by name of the field, secrets come from the environment."""

import pytest
import yaml
from pydantic import ValidationError

from cluster.settings import DEMO_MODEL_NAME, demo_model_path, resolve_config
from core.autoscaling_config import parse_days
from core.config import BatonConfig, ClusterConfig, load_config, parse_config
from core.errors import ConfigurationError


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"prefil": {}}, "prefil"),
        ({"prefill": {"max_num_seqs": 0}}, "prefill.max_num_seqs"),
        ({"decode": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas 3"),
        ({"transfer": {"channel": "carrier pigeon"}}, "transfer.channel"),
        ({"ingress": {"port": 70000}}, "ingress.port"),
        ({"scheduler": {"tenant_weights": {"acme": 0}}}, "scheduler.tenant_weights.acme"),
        ({"scheduler": {"slo": {"gold": {"ttft_s": 1, "itl_s": 1}}}}, "scheduler.slo.gold"),
        ({"decode": {"cache_floors": {"a": 0.7, "b": 0.5}}}, "cache_floors add up to 1.2"),
        (
            {"decode": {"cache_floors": {"a": 0.7}}, "ingress": {"tenants_share_prefixes": True}},
            "prefixes of their own",
        ),
        ({"block_size": "many"}, "block_size"),
        ({"autoscaling": {"ttft_target_s": 0}}, "autoscaling.ttft_target_s"),
        ({"autoscaling": {"max_gpus": 3}, "decode": {"tensor_parallel": 4}}, r"max_gpus 3 is below the 5 of min_rep"),
        ({"autoscaling": {"max_gpus": 3}, "decode": {"pipeline_parallel": 4}}, r"max_gpus 3 is below the 5 of min_rep"),
        ({"prefill": {"pipeline_parallel": 0}}, "prefill.pipeline_parallel"),
        ({"prefill": {"steps_in_flight": 3}}, "prefill: .*steps_in_flight 3 is above 2"),
        ({"prefill": {"steps_in_flight": 5, "pipeline_parallel": 4}}, "steps_in_flight 5 is above 4"),
        ({"autoscaling": {"forecast": {"bin_s": 7000}}}, "autoscaling.forecast.bin_s"),
        ({"autoscaling": {"schedule": [{"at": "8 am", "until": "18:00"}]}}, "autoscaling.schedule.0.at: .*'8 am'"),
        ({"autoscaling": {"schedule": [{"at": 750, "until": "18:00"}]}}, "autoscaling.schedule.0.at: .*in quotes"),
        ({"autoscaling": {"schedule": [{"at": "08:45", "until": "24:00"}]}}, "autoscaling.schedule.0.until"),
        ({"autoscaling": {"schedule": [{"at": "08:45", "until": "9:00", "days": "mon-fry"}]}}, "schedule.0.days.*fry"),
        ({"autoscaling": {"schedule": [{"at": "8:45", "until": "9:00", "timezone": "Paris"}]}}, "schedule.0.timezone"),
        ({"autoscaling": {"schedule": [{"at": "8:45", "until": "9:00", "decode": 2}]}}, "schedule.0.decode 2 is above"),
    ],
)
def test_what_is_wrong_is_named(tree, named):
    with pytest.raises(ConfigurationError, match=named):
        parse_config(tree)


def test_ranks_are_stages_times_the_ranks_of_a_stage():
    tree = {"tensor_parallel": 2, "pipeline_parallel": 3, "steps_in_flight": 3, "resources_per_rank": {"num_gpus": 1}}
    pool = parse_config({"prefill": tree}).prefill
    assert (pool.num_ranks, pool.replica_cost) == (6, 6.0)


@pytest.mark.parametrize(
    ("text", "days"),
    [("mon-fri", {0, 1, 2, 3, 4}), ("sat,sun", {5, 6}), ("Fri-Mon, wed", {4, 5, 6, 0, 2}), ("sun", {6})],
)
def test_days_are_names_and_ranges(text, days):
    assert parse_days(text) == days


def test_a_configuration_does_not_change():
    with pytest.raises(ValidationError):
        BatonConfig().ingress.port = 1


@pytest.mark.parametrize("text", ["prefill: [", "- a\n- list\n", None])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.yaml"):
        load_config(file)


def test_secrets_of_the_environment_fill_what_the_file_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setenv("BATON_API_KEY", "key")
    monkeypatch.setenv("BATON_CLUSTER_SECRET", "secret")
    file = tmp_path / "config.yaml"
    file.write_text("cluster: {secret: own}\ningress: {api_key: ''}\n")
    config = load_config(file)
    assert (config.ingress.api_key, config.cluster.secret) == ("key", "own")


def test_without_a_file_the_laptop_serves_the_demo_model():
    config = resolve_config(None)
    assert (config.model.path, config.model.name) == (str(demo_model_path()), DEMO_MODEL_NAME)
    assert (config.prefill.min_replicas, config.decode.min_replicas) == (2, 2)
    assert config.ingress.host == "127.0.0.1"


def test_flags_win_over_the_file(tmp_path):
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = resolve_config(None, model, 9001)
    assert (config.model.name, config.ingress.port) == ("my-model", 9001)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        resolve_config(None, tmp_path)


SERVE_FORM = {"applications": [{"name": "baton", "import_path": "cluster.serve_app:front", "args": {"block_size": 32}}]}


def test_a_serve_config_is_read_as_the_arguments_of_its_application(tmp_path, monkeypatch):
    monkeypatch.setenv("BATON_API_KEY", "key")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(SERVE_FORM))
    config = load_config(file)
    assert (config.block_size, config.ingress.api_key) == (32, "key")


@pytest.mark.parametrize(
    ("applications", "says"),
    [
        ("baton", "list of mappings"),
        ([], "exactly one with import_path cluster.serve_app:front, not 0"),
        ([{"import_path": "another:app"}], "not 0"),
        (SERVE_FORM["applications"] * 2, "not 2"),
        ([{"import_path": "cluster.serve_app:front", "args": [1]}], "args of the application"),
        ([{"import_path": "cluster.serve_app:front", "args": {"blok_size": 1}}], "blok_size"),
    ],
)
def test_a_serve_config_without_our_application_is_refused(tmp_path, applications, says):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"applications": applications}))
    with pytest.raises(ConfigurationError, match=says):
        load_config(file)


def test_secrets_of_the_environment_leave_wrong_sections_to_the_validator(tmp_path, monkeypatch):
    monkeypatch.setenv("BATON_API_KEY", "key")
    file = tmp_path / "config.yaml"
    file.write_text("ingress: [8000]\n")
    with pytest.raises(ConfigurationError, match="ingress"):
        load_config(file)


def test_on_a_cluster_the_bundled_model_is_filled_in_and_nothing_is_on_loopback(tmp_path):
    from cluster.serve_app import front, on_cluster  # brings Ray along

    config = on_cluster(BatonConfig(cluster=ClusterConfig(secret="s")))
    assert (config.model.path, config.model.name) == (str(demo_model_path()), DEMO_MODEL_NAME)
    assert config.cluster.address == "auto"
    named = BatonConfig(cluster=ClusterConfig(address="10.0.0.1:6379", secret="s"))
    assert on_cluster(named).cluster.address == "10.0.0.1:6379"
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        front({"model": {"path": str(tmp_path)}, "cluster": {"secret": "s"}})


def test_the_applications_are_built_from_arguments_alone():
    from cluster.serve_app import front, pools  # brings Ray along

    args = {"prefill": {"max_replicas": 2}, "cluster": {"secret": "s"}}
    assert (front(args)._bound_deployment.name, pools(args)._bound_deployment.name) == ("Ingress", "DecodePool")


@pytest.mark.parametrize("build", ["front", "pools"])
def test_on_a_cluster_a_fleet_without_a_secret_is_refused(build, monkeypatch):
    from cluster import serve_app  # brings Ray along

    monkeypatch.delenv("BATON_CLUSTER_SECRET", raising=False)
    with pytest.raises(ConfigurationError, match=r"cluster\.secret is empty.*secret_file") as caught:
        {"front": serve_app.front, "pools": serve_app.pools}[build]({})
    assert caught.value.field == "cluster.secret"
