"""The cost model beside what was measured on GPUs, and beside what no GPU can beat.

Figures of measured kernels and runs: NVIDIA's aiconfigurator (Apache-2.0), tables of vLLM 0.24 and of end-to-end runs.
"""

from dataclasses import replace

import numpy as np
import pytest

from core.errors import ConfigurationError
from simulator.cost.closed_loop import LoopShape, loop_times
from simulator.cost.cost_model import StepWork
from simulator.cost.engines import engine_overhead
from simulator.cost.gpu_cost_model import GpuCostModel
from simulator.cost.gpu_spec import GPUS, gpu_spec
from simulator.cost.gpus import gpu_cost_model, num_kv_blocks
from simulator.cost.kernel_times import kernel_times
from simulator.cost.models import served_model


@pytest.mark.parametrize(
    ("rows", "n", "k", "measured_ms"),
    [(32768, 65536, 12288, 60.324), (32768, 65536, 16384, 80.8501)],
)
def test_a_product_takes_what_was_measured_on_an_h100(rows, n, k, measured_ms):
    assert kernel_times("h100").product_s("bfloat16", rows, n, k) * 1e3 == pytest.approx(measured_ms, rel=0.15)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("rows", [1, 7, 64, 300, 2048, 8192, 50000])
def test_no_product_is_faster_than_its_gpu(gpu, rows):
    n, k, spec = 8192, 8192, gpu_spec(gpu)
    floor_s = max(2 * n * k / spec.memory_bytes_per_s, 2 * rows * n * k / spec.matmul_flops)
    assert kernel_times(gpu).product_s("bfloat16", rows, n, k) > 0.95 * floor_s


@pytest.mark.parametrize("gpu", GPUS)
def test_decode_attention_reads_kv_no_faster_than_memory(gpu):
    kv_tokens, heads, kv_heads, head_dim = 2**20, 32, 8, 128
    floor_s = 4 * kv_tokens * kv_heads * head_dim / gpu_spec(gpu).memory_bytes_per_s
    found = kernel_times(gpu).generation_attention_s(64, kv_tokens, heads, kv_heads, head_dim)
    assert floor_s < found < 1.3 * floor_s


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt-oss-120b", "deepseek-v3"])
def test_steps_at_once_take_what_each_takes_to_the_bit(model):
    costs = gpu_cost_model("h100", model, 8, "fp8" if model != "gpt-oss-120b" else "mxfp4")
    contexts = np.arange(1000, 200_000, 137)
    together = costs.decode_steps_s(24, contexts)
    assert together.tolist() == [costs.step_s(StepWork((), 24, int(context))) for context in contexts]
    assert (np.diff(together) >= 0).all()


def test_a_window_bounds_what_its_layers_read():
    costs = gpu_cost_model("h200", "gpt-oss-120b", 1, "mxfp4")
    short, long, longer = costs.decode_steps_s(1, np.array([64, 64_064, 128_064]))
    beyond = longer - long
    # Half of the layers see 128 tokens at most: the first 64,000 tokens cost as much as the next, up to what those saw.
    assert long - short == pytest.approx(beyond, rel=0.01)
    full = gpu_cost_model("h200", "llama-3.1-8b", 1).decode_steps_s(1, np.array([64_000, 128_000]))
    assert full[1] - full[0] > 0


@pytest.mark.parametrize(
    ("ranks", "clients", "prompt", "output", "tpot_ms", "ttft_ms"),
    [
        (2, 4, 1024, 1024, 17.407, 121.3),
        (4, 32, 1024, 1024, 16.492, 174.8),
        (4, 16, 8192, 1024, 21.064, 731.5),
        (8, 8, 8192, 1024, 11.588, 360.7),
        (8, 64, 1024, 8192, 16.489, 176.2),
    ],
)
def test_llama_70b_decodes_as_measured_though_it_was_not_fitted(ranks, clients, prompt, output, tpot_ms, ttft_ms):
    costs = GpuCostModel(gpu_spec("h100"), served_model("llama-3.1-70b"), ranks, "fp8", engine_overhead("vllm"))
    shape = LoopShape(clients, prompt, output, least_size=0.8)  # as the campaign's benchmarks drew them
    times = loop_times(shape, lambda work: (costs.step_s(work),))
    assert times.tpot(0.1)[0] * 1e3 == pytest.approx(tpot_ms, rel=0.12)  # they sent ten prompts per client
    own_s = costs.step_s(StepWork(((prompt, 0),)))  # later ones find no other prompt before theirs
    assert (0.1 * times.first_ttft[0] + 0.9 * own_s) * 1e3 == pytest.approx(ttft_ms, rel=0.35)


@pytest.mark.parametrize(
    ("gpu", "dtype", "tokens", "shape", "split", "ranks", "measured_ms"),
    [
        ("h100", "fp8_block", 64, (4096, 1536, 8, 128), 4, 1, 0.235),
        ("h100", "fp8_block", 64, (4096, 1536, 8, 128), 1, 4, 0.230),
        ("h200", "fp8_block", 1024, (7168, 2048, 8, 256), 8, 1, 0.611),
        ("h200", "mxfp4", 64, (2880, 2880, 4, 128), 1, 1, 0.517),
        ("h200", "mxfp4", 16, (2880, 2880, 4, 128), 8, 1, 0.072),
        ("h200", "mxfp4", 16, (2880, 2880, 4, 128), 1, 8, 0.091),
    ],
)
def test_experts_take_what_was_measured_split_or_shared(gpu, dtype, tokens, shape, split, ranks, measured_ms):
    hidden, inner, per_token, num_experts = shape
    found = kernel_times(gpu).experts_s(dtype, tokens, hidden, inner // split, per_token, num_experts, ranks)
    assert found * 1e3 == pytest.approx(measured_ms, rel=0.15)


def test_a_sum_over_two_hosts_takes_their_network_too():
    kernels, num_bytes = kernel_times("h100"), 16 * 2**20
    beyond_s = kernels.all_reduce_s(num_bytes, 16) - kernels.all_reduce_s(num_bytes, 8)
    assert beyond_s == pytest.approx(20e-6 + num_bytes / 8 / 39e9)  # there and back, of an eighth half each way


def test_replicated_attention_reads_its_part_of_the_sequences_and_experts_see_all():
    gpu, model = gpu_spec("h200"), served_model("deepseek-v3")
    together = GpuCostModel(gpu, model, 8, "fp8_block", expert_parallel=8)
    apart = GpuCostModel(gpu, model, 1, "fp8_block", expert_parallel=8, data_parallel=8)
    of_one = GpuCostModel(gpu, model, 1, "fp8_block", expert_parallel=1)

    def context_s(costs: GpuCostModel, num_decoding: int) -> float:
        short, long = (costs.step_s(StepWork((), num_decoding, num_decoding * length)) for length in (1000, 9000))
        return long - short

    assert context_s(apart, 64) == pytest.approx(context_s(of_one, 8))
    assert context_s(together, 64) > context_s(apart, 64)  # each rank reads the one latent of every sequence
    contexts = np.arange(64_000, 70_000, 137)
    assert apart.decode_steps_s(64, contexts).tolist() == [apart.step_s(StepWork((), 64, int(c))) for c in contexts]


def test_norms_over_all_heads_cost_a_sum_over_ranks_and_small_kernels_add_up():
    with_norms, plain = served_model("minimax-m2"), served_model("minimax-m2")
    plain = replace(plain, num_more_small_kernels=0, is_normed_across_ranks=False)
    work, gpu = StepWork((), 16, 16_000), gpu_spec("h200")
    more_s = GpuCostModel(gpu, with_norms, 4, "fp8_block").step_s(work) - GpuCostModel(
        gpu, plain, 4, "fp8_block"
    ).step_s(work)
    assert more_s == pytest.approx(62 * (9 * 3e-6 + kernel_times("h200").all_reduce_s(8 * 16, 4)))


def test_a_chunk_costs_more_behind_a_longer_context_and_beside_decoding_sequences():
    costs = gpu_cost_model("h100", "llama-3.1-70b", 4)
    alone = costs.step_s(StepWork(((2048, 0),)))
    assert costs.step_s(StepWork(((2048, 30_000),))) > 1.2 * alone
    beside = costs.step_s(StepWork(((2048, 0),), 32, 32 * 4000))
    assert alone < beside < alone + costs.step_s(StepWork((), 32, 32 * 4000))


def test_kv_that_fits_beside_the_weights():
    # 80 GiB x 0.9 less 16 GB of weights, 2 MiB for 16 tokens (128 KiB each).
    assert num_kv_blocks("h100", "llama-3.1-8b", 1, 16) == pytest.approx((0.9 * 80 * 2**30 - 16.06e9) / 2**21, rel=0.05)
    with pytest.raises(ConfigurationError):
        num_kv_blocks("h100", "llama-3.1-70b", 1, 16)


def test_unknown_names_and_splits_are_refused():
    with pytest.raises(ConfigurationError, match="known are h100, h200"):
        gpu_cost_model("a100", "llama-3.1-8b", 1)
    with pytest.raises(ConfigurationError, match="known are llama"):
        gpu_cost_model("h100", "llama-4", 1)
    with pytest.raises(ConfigurationError, match="tensor_parallel 3"):
        gpu_cost_model("h100", "llama-3.1-8b", 3)
