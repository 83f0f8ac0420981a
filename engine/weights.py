"""The weights of one rank, put together from its parameters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.arithmetic import arithmetic_dtype
from engine.experts import Experts, MixtureOfExperts
from engine.grouped_experts import GroupedExperts
from engine.hosted_layers import HostedLayers
from engine.kernels import Kernels, Norm
from engine.latent_up import LatentUp
from engine.linear import Linear
from engine.mlp import Activate, Mlp
from engine.model_parameters import Share
from engine.model_spec import (
    Activation,
    AttentionSpec,
    DecoderSpec,
    LatentAttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from engine.router import Router
from engine.weight_stream import WeightStream

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

StoredAs = Callable[[], Tensor]  # a parameter as it was loaded, which may have to be made first


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention on one rank."""

    qkv: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    sinks: Tensor | None
    output: Linear


@dataclass(frozen=True)
class LatentAttentionWeights:
    """One layer's attention over latents on one rank. Queries come down, are normed and go up, or are made at once."""

    spec: LatentAttentionSpec
    down: Linear  # hidden -> latent, key part to be rotated, queries or what they are made of
    query_norm: Norm | None
    query_up: Linear | None
    latent_norm: Norm
    up: LatentUp
    output: Linear


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer of one rank."""

    attention_norm: Norm
    attention: AttentionWeights | LatentAttentionWeights
    attention_norm_after: Norm | None
    mlp_norm: Norm
    mlp: Mlp | MixtureOfExperts
    mlp_norm_after: Norm | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights of one rank. `embedding` and `head` hold the rows [part * rows, (part + 1) * rows) of the vocabulary,
    zero beyond its end.
    """

    embedding: Tensor | None  # [rows, hidden]; of the first stage
    layers: tuple[LayerWeights, ...]  # of the stage
    final_norm: Norm | None  # of the last stage
    head: Linear | None  # hidden -> rows; of the last stage
    parameters: tuple[StoredAs, ...]  # in the order of `list_parameters`
    stream: WeightStream | None = None  # brings the last layers, in their order

    def in_turn(self) -> Iterator[LayerWeights]:
        """Every layer, with its weights on the device until the next is asked for."""
        streamed = () if self.stream is None else self.stream.in_turn()
        num_resident = len(self.layers) - (0 if self.stream is None else self.stream.num_layers)
        yield from self.layers[:num_resident]
        for number in streamed:
            yield self.layers[num_resident + number]


def assemble(
    spec: ModelSpec,
    share: Share,
    device: torch.device,
    named: Iterator[tuple[str, Tensor]],
    kernels: Kernels,
    num_resident: int | None = None,
) -> ModelWeights:
    """`named`: parameters on `device` and their names, in the order of `list_parameters`. `num_resident`: layers that
    stay there; None: all.
    """
    loading = _Loading(named, device, spec.decoder, kernels)
    layers: list[LayerWeights] = []
    hosted: HostedLayers[tuple[LayerWeights, list[StoredAs]]] = HostedLayers(device)
    for number, index in enumerate(share.layers):
        num_taken = len(loading.taken)
        loading.may_pack = num_resident is None or number < num_resident
        made = _layer(loading, spec.decoder.layers[index], share, f"layers.{index}.")
        if loading.may_pack:
            layers.append(made)
        else:  # what others borrow is read from the host, since it is not always on the device
            _, loading.taken[num_taken:] = hosted.add((made, loading.taken[num_taken:]))
    loading.may_pack = True
    is_tied = share.is_last and spec.tie_word_embeddings
    final_norm = loading.norm("final_norm") if share.is_last else None
    embedding = loading.tensor_if(share.is_first or is_tied, "embedding")
    head = None
    if share.is_last:
        head = Linear(embedding) if is_tied and embedding is not None else loading.linear("head", has_bias=False)
    assert next(named, None) is None, "parameters are left over"
    stream = None
    if hosted:
        stream, streamed = hosted.stream()
        layers += (layer for layer, _ in streamed)
    table = embedding if share.is_first else None
    return ModelWeights(table, tuple(layers), final_norm, head, tuple(loading.taken), stream)


class _Loading:
    """Takes parameters in their order, as weights ask for them by name."""

    def __init__(
        self, named: Iterator[tuple[str, Tensor]], device: torch.device, decoder: DecoderSpec, kernels: Kernels
    ) -> None:
        self._named = named
        self._decoder = decoder
        self._kernels = kernels
        self.device = device
        self.may_pack = True
        self.taken: list[StoredAs] = []

    def tensor(self, name: str) -> Tensor:
        """Kept as it is."""
        tensor = self._next(name)
        self.taken.append(partial(_same, tensor))
        return tensor

    def norm(self, name: str, eps: float | None = None) -> Norm:
        """`eps` None: that of the model's decoder."""
        stored, decoder = self.tensor(name), self._decoder
        weight = stored.float() + decoder.norm_offset if decoder.norm_offset else _widened(stored)
        return Norm(stored, weight, bool(decoder.norm_offset), decoder.norm_eps if eps is None else eps)

    def norm_if(self, wanted: bool, name: str, eps: float | None = None) -> Norm | None:
        """None unless wanted."""
        return self.norm(name, eps) if wanted else None

    def activate(self, activation: Activation) -> Activate:
        """By the kernels that the model is computed with."""
        return partial(self._kernels.activate, activation=activation)

    def tensor_if(self, wanted: bool, name: str) -> Tensor | None:
        """None unless wanted."""
        return self.tensor(name) if wanted else None

    def linear(self, name: str, has_bias: bool) -> Linear:
        """May be repacked, so the parameter passed in is not kept."""
        weight = self._next(name)
        made = Linear(weight, self._next(f"{name}_bias") if has_bias else None, may_pack=self.may_pack)
        self.taken += [made.rows] if made.bias is None else [made.rows, partial(_same, made.bias)]
        return made

    def stacks(self, owners: Sequence[str], parts: Sequence[str]) -> dict[str, Tensor]:
        """Each part of all owners, [owners, ...]; kept stacked alone."""
        loaded: dict[str, list[Tensor]] = {part: [] for part in parts}
        for owner in owners:
            for part in parts:
                loaded[part].append(self._next(owner + part))
        stacked = {part: torch.stack(loaded.pop(part)) for part in parts}
        self.taken += [partial(_row, stacked[part], number) for number in range(len(owners)) for part in parts]
        return stacked

    def _next(self, name: str) -> Tensor:
        came, tensor = next(self._named)
        assert came == name, f"parameter {came} came for {name}"
        return tensor


def _layer(loading: _Loading, layer: LayerSpec, share: Share, name: str) -> LayerWeights:
    """Dataclass arguments are evaluated in the order of the parameters."""
    return LayerWeights(
        attention_norm=loading.norm(f"{name}attention_norm"),
        attention=_latent_attention(loading, layer.attention, name)
        if isinstance(layer.attention, LatentAttentionSpec)
        else _attention(loading, layer.attention, share, name),
        attention_norm_after=loading.norm_if(layer.norms_after, f"{name}attention_norm_after"),
        mlp_norm=loading.norm(f"{name}mlp_norm"),
        mlp=_mixture(loading, layer.mlp, share, name)
        if isinstance(layer.mlp, MoeSpec)
        else _mlp(loading, layer.mlp, name, share.part == 0),
        mlp_norm_after=loading.norm_if(layer.norms_after, f"{name}mlp_norm_after"),
    )


def _attention(loading: _Loading, attention: AttentionSpec, share: Share, name: str) -> AttentionWeights:
    return AttentionWeights(
        qkv=loading.linear(f"{name}qkv", attention.qkv_bias),
        query_norm=loading.norm_if(attention.qk_norm, f"{name}query_norm"),
        key_norm=loading.norm_if(attention.qk_norm, f"{name}key_norm"),
        sinks=loading.tensor_if(attention.has_sinks, f"{name}sinks"),
        output=loading.linear(f"{name}output", attention.output_bias and share.part == 0),
    )


def _latent_attention(loading: _Loading, attention: LatentAttentionSpec, name: str) -> LatentAttentionWeights:
    sizes = attention.sizes
    goes_up = sizes.q_lora_rank is not None
    return LatentAttentionWeights(
        attention,
        down=loading.linear(f"{name}latent_down", has_bias=False),
        query_norm=loading.norm_if(goes_up, f"{name}query_norm", attention.norm_eps),
        query_up=loading.linear(f"{name}query_up", has_bias=False) if goes_up else None,
        latent_norm=loading.norm(f"{name}latent_norm", attention.norm_eps),
        up=LatentUp(
            _widened(loading.tensor(f"{name}latent_up")).view(-1, sizes.made_size, sizes.kv_lora_rank),
            sizes.qk_nope_head_dim,
        ),
        output=loading.linear(f"{name}output", has_bias=False),
    )


def _mlp(loading: _Loading, mlp: MlpSpec, name: str, adds_bias: bool) -> Mlp:
    gate_up = loading.linear(f"{name}gate_up", mlp.bias)
    return Mlp(gate_up, loading.linear(f"{name}down", mlp.bias and adds_bias), loading.activate(mlp.activation))


def _mixture(loading: _Loading, mixture: MoeSpec, share: Share, name: str) -> MixtureOfExperts:
    spec = mixture.router
    router = Router(
        spec,
        loading.tensor(f"{name}router"),
        loading.tensor_if(spec.bias, f"{name}router_bias"),
        loading.tensor_if(spec.has_correction, f"{name}correction"),
    )
    numbers, adds_bias = share.experts(spec.num_experts), share.whole_experts or share.part == 0
    experts: Experts | GroupedExperts
    if multiplies_in_groups(loading.device):
        experts = _grouped(loading, mixture.expert, f"{name}experts.", numbers, adds_bias)
    else:
        own = [_mlp(loading, mixture.expert, f"{name}experts.{number}.", adds_bias) for number in numbers]
        experts = Experts(numbers.start, own)
    shared = None if mixture.shared is None else _mlp(loading, mixture.shared, f"{name}shared.", share.part == 0)
    return MixtureOfExperts(router, experts, shared)


def multiplies_in_groups(device: torch.device) -> bool:
    """Whether experts are stacked; a CPU is faster with each repacked for its own products."""
    return device.type == "cuda"


def _grouped(loading: _Loading, mlp: MlpSpec, name: str, numbers: range, adds_bias: bool) -> GroupedExperts:
    parts = [
        "gate_up",
        *(["gate_up_bias"] if mlp.bias else []),
        "down",
        *(["down_bias"] if mlp.bias and adds_bias else []),
    ]
    stacks = loading.stacks([f"{name}{number}." for number in numbers], parts)
    return GroupedExperts(
        numbers.start,
        stacks["gate_up"],
        stacks.get("gate_up_bias"),
        stacks["down"],
        stacks.get("down_bias"),
        loading.activate(mlp.activation),
    )


def _widened(tensor: Tensor) -> Tensor:
    """In the precision that its device computes in."""
    return tensor.to(arithmetic_dtype(tensor.device, tensor.dtype))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _row(stacked: Tensor, number: int) -> Tensor:
    return stacked[number]
