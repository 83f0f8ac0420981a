"""`baton check`: the arithmetic of a configuration that fits, and the refusals of those that do not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.check.checkpoint_size import count_parameters
from cluster.check.node_types import read_node_types, require_room
from cluster.check.plan import Hardware, make_plan
from cluster.check.rank_memory import count_channels, largest_channel_bytes
from cluster.cli import app
from core.config import BatonConfig, TransferConfig, parse_config
from core.errors import ConfigurationError
from core.model_geometry import ExpertGeometry, LatentGeometry, ModelGeometry, geometry_of, read_geometry
from engine.checkpoint import load_model_spec
from tests.checkpoints import make_checkpoint, make_mxfp4_checkpoint

FOLDER = Path(__file__).parent.parent.parent / "ray_configs"
LLAMA_8B = ModelGeometry(32, 4096, 32, 8, 128, 14336, 128256, False, 131072, "bfloat16")
LLAMA_70B = replace(LLAMA_8B, num_layers=80, hidden_size=8192, num_heads=64, intermediate_size=28672)
DEEPSEEK_V3 = ModelGeometry(
    num_layers=61,
    hidden_size=7168,
    num_heads=128,
    num_kv_heads=1,
    head_dim=576,
    intermediate_size=18432,
    vocab_size=129280,
    tie_word_embeddings=False,
    max_model_len=163840,
    dtype="bfloat16",
    experts=ExpertGeometry(256, 2048, 2048, num_dense_layers=3),
    latents=LatentGeometry(1536, 512, 128, 64, 128),
)
GIB = 2**30


def on_gpus(prefill: dict | None = None, decode: dict | None = None, **sections) -> BatonConfig:
    pool = {"device": "cuda", "resources_per_rank": {"num_gpus": 1, "accelerator_type": "H100"}}
    tree = {"model": {"max_model_len": 8192}, "transfer": {"channel": "nccl"}, **sections}
    return parse_config({**tree, "prefill": pool | (prefill or {}), "decode": pool | (decode or {})})


def write_config_json(folder: Path, geometry: ModelGeometry) -> Path:
    folder.mkdir()
    tree = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": geometry.num_layers,
        "hidden_size": geometry.hidden_size,
        "num_attention_heads": geometry.num_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "intermediate_size": geometry.intermediate_size,
        "vocab_size": geometry.vocab_size,
        "max_position_embeddings": geometry.max_model_len,
        "torch_dtype": geometry.dtype,
    }
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def problems(config: BatonConfig, geometry: ModelGeometry = LLAMA_8B, **hardware) -> dict[str, str]:
    plan = make_plan(config, geometry, None, Hardware(**{"host_bytes": 24 * GIB, **hardware}))
    return {problem.field: problem.message for problem in plan.problems}


def test_a_rank_is_weights_kv_channels_and_a_reserve():
    config = on_gpus({"max_replicas": 2}, {"tensor_parallel": 2, "max_replicas": 3})
    plan = make_plan(config, LLAMA_8B, None, Hardware(host_bytes=24 * GIB))
    assert plan.problems == ()
    prefill, decode = plan.pools
    assert prefill.rank.weight_bytes == 8_029_995_008 * 2
    assert decode.rank.weight_bytes == 8_029_995_008
    budget = int(int(79.1 * GIB) * 0.9) - prefill.rank.weight_bytes - GIB
    assert prefill.rank.num_blocks == budget // (16 * 131072) == 28279
    assert prefill.rank.kv_bytes == 28279 * 2 * 2**20
    assert prefill.num_tokens == 28279 * 16
    # a prefill rank feeds both ranks of three decode replicas, a decode rank is fed by two prefill replicas
    assert (prefill.rank.num_channels, decode.rank.num_channels) == (6, 2)
    assert decode.rank.channel_bytes == 2 * (2 * 16 * 2**20 + 52_000_000)
    assert prefill.rank.total_bytes == sum((16_059_990_016, 28279 * 2**21, 6 * 85_554_432, GIB))
    assert prefill.num_ranks == 2 and decode.num_ranks == 6


def test_a_stage_has_its_layers_weights_and_kv_and_one_table():
    stages = {"pipeline_parallel": 2, "max_replicas": 2, "steps_in_flight": 2, "engine": {"attention": "torch"}}
    plan = make_plan(on_gpus(stages, {"tensor_parallel": 2}), LLAMA_8B, None, Hardware(host_bytes=24 * GIB))
    assert plan.problems == ()
    prefill, decode = plan.pools
    assert prefill.rank.weight_bytes == 8_029_995_008, "half of the layers, and either the embedding or the head"
    budget = int(int(79.1 * GIB) * 0.9) - prefill.rank.weight_bytes - GIB
    assert prefill.rank.num_blocks == budget // (16 * 65536)
    assert prefill.rank.kv_bytes == prefill.rank.num_blocks * 2**20
    assert prefill.num_ranks == 4
    # every stage has layers that both decode ranks want; these are fed by both stages of two replicas
    assert (prefill.rank.num_channels, decode.rank.num_channels) == (2, 4)


def test_the_largest_stage_counts():
    """61 layers, 3 of them dense, in 4 stages: 16, 15, 15, 15; the last has the head, the first the dense ones."""
    layout = DEEPSEEK_V3.kv_layout(8, 16, 4)
    sizes = [DEEPSEEK_V3.num_parameters_of_stage(layout, stage) for stage in range(4)]
    assert sum(sizes) == DEEPSEEK_V3.num_parameters
    assert [round(size / 1e9, 1) for size in sizes] == [152.3, 172.6, 172.6, 173.5]
    assert DEEPSEEK_V3.weight_bytes_per_rank(layout) == sizes[3] * 2 // 8
    assert layout.block_bytes_per_rank == 16 * 16 * 576 * 2


@pytest.mark.parametrize("channel", ["auto", "measured", "nixl"])
def test_a_channel_that_is_chosen_in_service_fits_any_device(channel):
    on_cpus = parse_config({"transfer": {"channel": channel}})
    assert "transfer.channel" not in problems(on_gpus(transfer={"channel": channel}))
    assert "transfer.channel" not in problems(on_cpus)


@pytest.mark.parametrize(
    ("channel", "device", "num_bytes"),
    [
        ("auto", "cuda", 2 * 16 * 2**20 + 52_000_000),  # as large as the largest that may be chosen
        ("auto", "cpu", 0),
        ("measured", "cuda", 2 * 16 * 2**20 + 52_000_000),
        ("measured", "cpu", 2 * 16 * 2**20),
        ("cuda_ipc", "cuda", 16 * 2**20),
        ("tcp", "cpu", 0),
        ("nixl", "cuda", 16 * 2**20),
        ("shared_memory", "cpu", 0),
    ],
)
def test_what_one_channel_takes(channel, device, num_bytes):
    assert largest_channel_bytes(TransferConfig(channel=channel), LLAMA_8B.kv_layout(1, 16), device) == num_bytes


@pytest.mark.parametrize(
    ("prefill", "decode", "channels"),
    [(1, 1, (1, 1)), (4, 8, (2, 1)), (8, 4, (1, 2)), (16, 8, (1, 1)), (8, 16, (2, 1))],
)
def test_channels_join_ranks_whose_heads_or_shares_of_latents_overlap(prefill, decode, channels):
    layouts = [LLAMA_70B.kv_layout(tensor_parallel, 16) for tensor_parallel in (prefill, decode)]
    assert count_channels(*layouts) == channels
    latents = [DEEPSEEK_V3.kv_layout(tensor_parallel, 16) for tensor_parallel in (prefill, decode)]
    assert count_channels(*latents) == (max(1, decode // prefill), max(1, prefill // decode))


@pytest.mark.parametrize(
    ("config", "field", "says"),
    [
        (on_gpus({"tensor_parallel": 3}), "prefill.tensor_parallel", "3 must divide 32 attention heads"),
        (on_gpus({"tensor_parallel": 16}), "prefill.tensor_parallel", "16 GPUs"),
        (on_gpus({"pipeline_parallel": 33}), "prefill.pipeline_parallel", "33 is above the 32 layers of the model"),
        (on_gpus({}, {"pipeline_parallel": 2, "tensor_parallel": 8}), "decode.pipeline_parallel", "16 GPUs"),
        (on_gpus({"num_blocks": 64}), "prefill.num_blocks", "64 blocks hold 1024 tokens, fewer than the 8192"),
        (on_gpus({}, {"memory_fraction": 0.18}), "decode.tensor_parallel", "15.0 GiB of weights per rank at"),
        (on_gpus({}, {"memory_fraction": 0.2}), "decode.memory_fraction", "0 MiB for the KV cache hold 0 blocks"),
        (on_gpus({}, {"num_blocks": 40000}), "decode.num_blocks", "94.2 GiB of 79.1 GiB, with 78.1 GiB of KV"),
        (on_gpus({}, {"dtype": "float16"}), "decode.dtype", "float16, but prefill has bfloat16"),
        (on_gpus(transfer={"channel": "gloo"}), "transfer.channel", "gloo cannot carry pools on cuda"),
        (on_gpus(transfer={"channel": "tcp"}), "transfer.channel", "tcp cannot carry pools on cuda"),
        (
            on_gpus(transfer={"channel": "shared_memory"}),
            "transfer.channel",
            "shared_memory cannot carry pools on cuda",
        ),
        (parse_config({"transfer": {"channel": "nccl"}}), "transfer.channel", "nccl cannot carry pools on cpu"),
        (parse_config({"transfer": {"channel": "cuda_ipc"}}), "transfer.channel", "cuda_ipc cannot carry pools on cpu"),
        (on_gpus({}, {"device": "cpu"}), "decode.device", "cpu, but prefill is on cuda"),
        (on_gpus(model={"max_model_len": 200_000}), "model.max_model_len", "exceeds the checkpoint's 131072"),
        (on_gpus({"resources_per_rank": {"num_gpus": 1}}), "prefill.resources_per_rank.accelerator_type", "H200"),
        (on_gpus({"resources_per_rank": {}}), "prefill.resources_per_rank.num_gpus", "computes on 1 GPU"),
        (
            on_gpus(
                {},
                {"max_replicas": 32, "tensor_parallel": 8},
                transfer={"channel": "nccl", "slab_mib": 64, "pairs_mib": 2**16},
            ),
            "prefill.memory_fraction",
            "44.4 GiB for 256 channels",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_what_cannot_work_is_refused_by_field_and_limit(config, field, says):
    assert says in problems(config).get(field, "")


def test_weights_that_exceed_a_gpu_are_refused():
    found = problems(on_gpus({"tensor_parallel": 2}, {"tensor_parallel": 1}), LLAMA_70B)
    assert found == {
        "decode.tensor_parallel": "131.4 GiB of weights per rank at tensor_parallel 1 exceed 71.2 GiB of its memory"
    }
    h200 = problems(on_gpus({"tensor_parallel": 2}, {"tensor_parallel": 2}), LLAMA_70B, memory_gib=139)
    assert h200 == {}


def test_latents_are_small_and_whole_on_every_rank_while_heads_are_split():
    assert round(DEEPSEEK_V3.num_parameters / 1e9) == 671
    for tensor_parallel in (1, 8, 16):
        layout = DEEPSEEK_V3.kv_layout(tensor_parallel, 16)
        assert layout.latent and layout.block_bytes_per_rank == 16 * 61 * 576 * 2
    config = on_gpus({"tensor_parallel": 16, "num_blocks": 8192}, {"tensor_parallel": 16, "num_blocks": 8192})
    plan = make_plan(config, DEEPSEEK_V3, None, Hardware(host_bytes=24 * GIB, memory_gib=192))
    prefill, decode = plan.pools
    assert decode.rank.kv_bytes == 8192 * 16 * 61 * 576 * 2
    assert (prefill.rank.num_channels, decode.rank.num_channels) == (1, 1 + 2 * 15)
    refused = problems(on_gpus({"tensor_parallel": 3}), DEEPSEEK_V3)["prefill.tensor_parallel"]
    assert "3 must divide 128 attention heads" in refused


def test_kv_heads_must_split_too():
    odd = replace(LLAMA_8B, num_heads=24, num_kv_heads=8, intermediate_size=14592)
    assert "must divide 8 KV heads" in problems(on_gpus({"tensor_parallel": 3}), odd)["prefill.tensor_parallel"]


def test_layers_with_a_window_take_a_windows_blocks():
    """Of Gemma 3's shape: one group of global layers, five of local ones, each of a sixth of the layers."""
    layer_types = (["sliding_attention"] * 5 + ["full_attention"]) * 4
    local = {"model_type": "gemma3_text", "sliding_window": 1024, "layer_types": layer_types}
    sizes = {
        "num_hidden_layers": 24, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    }  # fmt: skip
    windowed, plain = geometry_of(local | sizes), geometry_of({"model_type": "llama"} | sizes)
    config = on_gpus(
        {"max_num_batched_tokens": 2048}, {"max_num_batched_tokens": 2048}, model={"max_model_len": 131072}
    )
    (ours, _), (theirs, _) = (
        make_plan(config, one, None, Hardware(host_bytes=24 * GIB)).pools for one in (windowed, plain)
    )
    assert theirs.layout.block_bytes_per_rank == 6 * ours.layout.block_bytes_per_rank
    assert theirs.num_tokens == theirs.rank.num_blocks * 16
    # of a long sequence five groups hold the 1,023 tokens behind a step's first and its 2,048: 193 blocks at most
    assert ours.num_tokens == (ours.rank.num_blocks - 5 * 193) * 16 > 5 * theirs.num_tokens
    few = {"max_num_batched_tokens": 2048, "num_blocks": 8192 + 5 * 193}
    assert problems(on_gpus(few, few, model={"max_model_len": 131072}), windowed) == {}
    found = problems(on_gpus(few | {"num_blocks": 8192 + 5 * 193 - 1}, few, model={"max_model_len": 131072}), windowed)
    assert found == {
        "prefill.num_blocks": "9156 blocks hold 131056 tokens, fewer than the 131072 of model.max_model_len"
    }


def test_pools_on_cpu_share_their_hosts_memory():
    config = parse_config({"prefill": {"kv_cache_mib": 8192}, "decode": {"kv_cache_mib": 8192}})
    tiny = replace(LLAMA_8B, num_layers=2, max_model_len=4096)
    assert problems(config, tiny, host_bytes=24 * GIB) == {}
    found = problems(config, tiny, host_bytes=16 * GIB)
    assert found == {"prefill.max_replicas, decode.max_replicas": "2 ranks take 21.9 GiB of the host's 16.0 GiB"}


def test_replicas_are_placed_on_the_nodes_of_a_cluster_file():
    cluster = yaml.safe_load((FOLDER / "clusters" / "gcp_a3.yaml").read_text())
    types = read_node_types(cluster)
    assert [(t.name, t.max_nodes) for t in types] == [("head", 1), ("prefill", 1), ("decode", 1)]
    two_nodes = parse_config(
        yaml.safe_load((FOLDER / "serve" / "two_nodes.yaml").read_text())["applications"][0]["args"]
    )
    pools = {"prefill": two_nodes.prefill, "decode": two_nodes.decode}
    require_room(pools, types)
    more = {**pools, "prefill": two_nodes.prefill.model_copy(update={"max_replicas": 3})}
    with pytest.raises(ConfigurationError, match="hold 2 replicas of tensor_parallel 4, not max_replicas 3") as raised:
        require_room(more, types)
    assert raised.value.field == "prefill.max_replicas"


def test_pools_without_a_role_share_a_node():
    one_host = read_node_types(
        {
            "max_workers": 1,
            "available_node_types": {"gpu": {"resources": {"CPU": 64, "GPU": 8, "accelerator_type:H100": 1}}},
        }
    )
    config = on_gpus({"tensor_parallel": 2, "max_replicas": 2}, {"tensor_parallel": 4})
    require_room({"prefill": config.prefill, "decode": config.decode}, one_host)
    config = on_gpus({"tensor_parallel": 2, "max_replicas": 3}, {"tensor_parallel": 4})
    with pytest.raises(ConfigurationError, match="hold 2 replicas"):
        require_room({"prefill": config.prefill, "decode": config.decode}, one_host)
    stages = on_gpus({"tensor_parallel": 2, "pipeline_parallel": 2, "max_replicas": 2}, {"tensor_parallel": 1})
    with pytest.raises(ConfigurationError, match="hold 0 replicas of tensor_parallel 1") as raised:
        require_room({"prefill": stages.prefill, "decode": stages.decode}, one_host)
    assert raised.value.field == "decode.max_replicas"
    stages = on_gpus({"tensor_parallel": 2, "pipeline_parallel": 2, "max_replicas": 3})
    with pytest.raises(ConfigurationError, match="hold 2 replicas of tensor_parallel 2 x pipeline_parallel 2, not"):
        require_room({"prefill": stages.prefill, "decode": stages.decode}, one_host)


def test_own_hosts_have_no_node_types():
    with pytest.raises(ConfigurationError, match="available_node_types"):
        read_node_types(yaml.safe_load((FOLDER / "clusters" / "on_premise.yaml").read_text()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_what_check_reads_is_what_the_engine_loads(tmp_path, family):
    folder = make_checkpoint(tmp_path, family, shard_size="100KB")
    spec = load_model_spec(folder)
    assert read_geometry(folder) == spec.geometry
    counted = count_parameters(folder)
    assert counted is not None
    assert spec.num_parameters < counted < spec.num_parameters * 1.05  # norms and biases
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ConfigurationError, match="cut short"):
        count_parameters(folder)


def test_packed_weights_are_counted_as_they_will_be_held(tmp_path):
    plain, packed = make_checkpoint(tmp_path / "plain", "gpt_oss"), make_mxfp4_checkpoint(tmp_path / "packed")
    assert count_parameters(packed) == count_parameters(plain)
    geometry = read_geometry(packed)
    assert (geometry.dtype, geometry.weight_bytes_per_rank(geometry.kv_layout(2, 16))) == (
        "bfloat16",
        read_geometry(plain).num_parameters,
    )


def test_a_config_json_without_sizes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(ConfigurationError, match="num_hidden_layers, num_attention_heads"):
        read_geometry(tmp_path)


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["check", *map(str, arguments)])
    return result.exit_code, " ".join(result.stdout.split())


@pytest.mark.parametrize("name", ["one_node_8xh100", "two_nodes", "fleet_16_nodes"])
@pytest.mark.parametrize("geometry", [LLAMA_8B, LLAMA_70B], ids=["8B", "70B"])
def test_every_shipped_serve_config_fits(tmp_path, name, geometry):
    code, said = run(FOLDER / "serve" / f"{name}.yaml", "--model", write_config_json(tmp_path / "model", geometry))
    assert (code, said.endswith("it fits")) == (0, True), said


def test_the_laptops_configuration_fits_with_the_bundled_model():
    code, said = run()
    assert code == 0 and "headers of the weight files" in said


def test_a_configuration_that_does_not_fit_ends_with_status_1_and_the_field(tmp_path):
    model = write_config_json(tmp_path / "model", LLAMA_70B)
    code, said = run(FOLDER / "serve" / "one_node_8xh100.yaml", "--model", model, "--memory-gib", 40)
    assert code == 1
    assert "error: prefill.tensor_parallel: 65.7 GiB of weights per rank at tensor_parallel 2 exceed 36.8 GiB" in said


def test_the_fleet_needs_more_hosts_than_the_cluster_file_starts_with(tmp_path):
    model, cluster = write_config_json(tmp_path / "model", LLAMA_70B), FOLDER / "clusters" / "gcp_a3.yaml"
    assert run(FOLDER / "serve" / "two_nodes.yaml", "--model", model, "--cluster-file", cluster)[0] == 0
    code, said = run(FOLDER / "serve" / "fleet_16_nodes.yaml", "--model", model, "--cluster-file", cluster)
    assert code == 1 and "decode.max_replicas: the nodes of the cluster" in said


def test_http_options_that_differ_from_the_ingress_section_are_refused(tmp_path):
    file = tmp_path / "config.yaml"
    text = (FOLDER / "serve" / "laptop_cpu.yaml").read_text()
    file.write_text(text.replace("http_options: {host: 127.0.0.1, port: 8000}", "http_options: {host: 127.0.0.1}"))
    assert run(file)[0] == 0
    file.write_text(text.replace("http_options: {host: 127.0.0.1, port: 8000}", "http_options: {port: 8001}"))
    code, said = run(file)
    assert code == 1 and "0.0.0.0, but ingress.host is 127.0.0.1" in said
