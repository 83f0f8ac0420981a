"""Steps of a replica on GPUs: the sum of its layers' kernels, and what the engine around them takes. Pure.

A rank's layer of T tokens:   norm, QKV product, attention, output product, all-reduce, norm, MLP or experts, all-reduce
Attention is paid by chunk for prompts and once for all decoding sequences; the head, by sequence. Replicas of attention
have their parts of the sequences each, and experts see the tokens of all.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulator.cost.cost_model import StepWork
from simulator.cost.gpu_spec import GpuSpec
from simulator.cost.kernel_times import KernelTimes, kernel_times
from simulator.cost.models import ServedModel

SMALL_KERNELS = 4  # of a layer: two norms, rotation and cache write, activation
SMALL_KERNEL_S = 1.5e-6  # one within a captured graph
MORE_SMALL_KERNEL_S = 3e-6  # one that reads what another just wrote: what aiconfigurator's h100_sxm.yaml takes for it
NORM_BYTES = 8  # of a token that is summed over ranks: squares of its query and of its key, in float32
NO_LIMIT = 2**40  # tokens: no window
HIDDEN_PASSES = 10  # times that they read or write a token's hidden state


@dataclass(frozen=True)
class EngineOverhead:
    """What an engine adds to its kernels; see `simulator.cost.engines` for where the figures are from."""

    step_s: float = 0.0  # of every step
    sequence_s: float = 0.0  # of every sequence in a step


class GpuCostModel:
    """Implements CostModel for one replica of `tensor_parallel` GPUs, 8 to a host."""

    def __init__(
        self,
        gpu: GpuSpec,
        model: ServedModel,
        tensor_parallel: int,
        precision: str = "bfloat16",
        overhead: EngineOverhead = EngineOverhead(),
        expert_parallel: int = 1,
        data_parallel: int = 1,
    ) -> None:
        """`precision` of weights and products: bfloat16, fp8, fp8_block; of experts also int4, mxfp4. Attention is
        replicated `data_parallel` times, each on `tensor_parallel` GPUs; experts are shared by all of these.

        Raises ConfigurationError when the model cannot be split so.
        """
        model.geometry.kv_layout(tensor_parallel, 1)  # raises
        self._gpu = gpu
        self._model = model
        self._tp = tensor_parallel
        self._ep = expert_parallel
        self._dp = data_parallel
        self._dense = precision if precision in ("bfloat16", "fp8", "fp8_block") else "bfloat16"
        self._experts = precision
        self._overhead = overhead
        self._kernels: KernelTimes = kernel_times(gpu.name)
        self._windows = _layers_by_window(model)
        self._decoding = lru_cache(maxsize=4096)(self._decode_lines)
        self._flat = lru_cache(maxsize=65536)(self._flat_s)

    def step_s(self, work: StepWork) -> float:
        """See CostModel."""
        if not work.chunks:
            fixed, lines = self._decoding(work.num_decoding)
            for per_token, most in lines:
                fixed += per_token * min(work.num_kv_tokens, most)
            return fixed
        num_tokens = sum(num for num, _ in work.chunks) + work.num_decoding
        num_sequences = len(work.chunks) + work.num_decoding
        kernels_s = self._flat(num_tokens, num_sequences)
        kernels_s += sum(self._chunk_attention_s(num, context) for num, context in work.chunks)
        if work.num_decoding:
            kernels_s += self._decode_attention_s(work.num_decoding, work.num_kv_tokens)
        return self._with_overhead(kernels_s, num_sequences)

    def decode_steps_s(self, num_decoding: int, num_kv_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """See CostModel."""
        fixed, lines = self._decoding(num_decoding)
        times = np.full(len(num_kv_tokens), fixed)
        for per_token, most in lines:
            times += per_token * np.minimum(num_kv_tokens, most)
        return times

    def _decode_lines(self, num_decoding: int) -> tuple[float, list[tuple[float, int]]]:
        """Seconds of so many sequences without context; by window, what each token of it adds, how many count."""
        without = self._flat(num_decoding, num_decoding) + self._decode_attention_s(num_decoding, 0)
        per_token = (self._layer_decode_s(num_decoding, 2**20) - self._layer_decode_s(num_decoding, 0)) / 2**20
        lines = [
            (num_layers * per_token, num_decoding * window if window else NO_LIMIT)
            for window, num_layers in self._windows.items()
        ]
        return self._with_overhead(without, num_decoding), lines

    def _with_overhead(self, kernels_s: float, num_sequences: int) -> float:
        return kernels_s + self._overhead.step_s + self._overhead.sequence_s * num_sequences

    def _flat_s(self, num_tokens: int, num_sequences: int) -> float:
        """All but attention."""
        geometry, experts = self._model.geometry, self._model.geometry.experts
        num_mixed = 0 if experts is None else geometry.num_layers - experts.num_dense_layers
        num_own = -(-num_tokens // self._dp)
        layer_s = self._projections_s(num_own) + self._small_s(num_own)
        if self._model.is_normed_across_ranks:
            layer_s += self._kernels.all_reduce_s(NORM_BYTES * num_own, self._tp)
        layer_s += self._kernels.all_reduce_s(2.0 * num_own * geometry.hidden_size, self._tp)
        layer_s += self._kernels.all_reduce_s(2.0 * num_tokens * geometry.hidden_size, self._tp * self._dp)
        mlps_s = (geometry.num_layers - num_mixed) * self._mlp_s(num_own, geometry.intermediate_size)
        if num_mixed:
            mlps_s += num_mixed * self._mixture_s(num_tokens)
        head_s = self._kernels.product_s(
            "bfloat16", -(-num_sequences // self._dp), geometry.vocab_size // self._tp, geometry.hidden_size
        )
        return geometry.num_layers * layer_s + mlps_s + head_s

    def _projections_s(self, num_tokens: int) -> float:
        geometry, latents = self._model.geometry, self._model.geometry.latents
        hidden, heads = geometry.hidden_size, geometry.num_heads // self._tp
        if latents is None:
            kv_heads = max(1, geometry.num_kv_heads // self._tp)
            shapes = [((heads + 2 * kv_heads) * geometry.head_dim, hidden), (hidden, heads * geometry.head_dim)]
        else:
            queries_of = latents.q_lora_rank or hidden
            shapes = [
                (latents.latent_size + (latents.q_lora_rank or 0), hidden),
                (heads * latents.query_size, queries_of),
                (heads * latents.made_size, latents.kv_lora_rank),
                (hidden, heads * latents.v_head_dim),
            ]
        return sum(self._kernels.product_s(self._dense, num_tokens, n, k) for n, k in shapes)

    def _mlp_s(self, num_tokens: int, inner: int) -> float:
        hidden, inner = self._model.geometry.hidden_size, inner // self._tp
        up, down = (2 * inner, hidden), (hidden, inner)
        return sum(self._kernels.product_s(self._dense, num_tokens, n, k) for n, k in (up, down))

    def _mixture_s(self, num_tokens: int) -> float:
        geometry, experts = self._model.geometry, self._model.geometry.experts
        assert experts is not None
        split = self._tp * self._dp // self._ep
        routed = self._kernels.experts_s(
            self._experts,
            num_tokens,
            geometry.hidden_size,
            experts.intermediate_size // split,
            self._model.experts_per_token,
            experts.num_experts,
            self._ep,
        )
        router = self._kernels.product_s("bfloat16", num_tokens, experts.num_experts, geometry.hidden_size)
        shared = self._mlp_s(num_tokens, experts.shared_intermediate_size) if experts.shared_intermediate_size else 0.0
        return router + routed + shared

    def _small_s(self, num_tokens: int) -> float:
        num_bytes = HIDDEN_PASSES * 2 * num_tokens * self._model.geometry.hidden_size
        more_s = self._model.num_more_small_kernels * MORE_SMALL_KERNEL_S
        return SMALL_KERNELS * SMALL_KERNEL_S + more_s + num_bytes / self._gpu.memory_bytes_per_s

    def _chunk_attention_s(self, num_tokens: int, context: int) -> float:
        geometry, latents = self._model.geometry, self._model.geometry.latents
        heads = geometry.num_heads // self._tp
        kv_heads = heads if latents else max(1, geometry.num_kv_heads // self._tp)
        head_dim = latents.query_size if latents else geometry.head_dim

        def layer_s(context: int) -> float:
            return self._kernels.context_attention_s(num_tokens, context, heads, kv_heads, head_dim)

        return sum(n * layer_s(min(context, window or context)) for window, n in self._windows.items()) / self._dp

    def _decode_attention_s(self, num_decoding: int, num_kv_tokens: float) -> float:
        return sum(
            num_layers * self._layer_decode_s(num_decoding, min(num_kv_tokens, num_decoding * (window or NO_LIMIT)))
            for window, num_layers in self._windows.items()
        )

    def _layer_decode_s(self, num_decoding: int, num_kv_tokens: float) -> float:
        geometry = self._model.geometry
        heads, kv_heads = geometry.num_heads // self._tp, max(1, geometry.num_kv_heads // self._tp)
        head_dim = geometry.head_dim
        if geometry.latents is not None:
            # K and V are one latent of 576 numbers, whose bytes are read once: as much as a head of 288.
            head_dim = geometry.latents.latent_size // 2
        num_own = -(-num_decoding // self._dp)
        return self._kernels.generation_attention_s(num_own, num_kv_tokens / self._dp, heads, kv_heads, head_dim)


def _layers_by_window(model: ServedModel) -> Counter[int | None]:
    geometry = model.geometry
    if not geometry.kv_groups:
        return Counter({None: geometry.num_layers})
    found: Counter[int | None] = Counter()
    for group in geometry.kv_groups:
        found[group.window] += len(group.layers)
    return found
