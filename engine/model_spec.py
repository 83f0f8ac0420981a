"""What the engine computes, in numbers: read off a checkpoint's configuration by its family's module. Pure."""

from dataclasses import dataclass
from typing import Literal

from core.kv_layout import KVLayout
from core.model_geometry import LatentGeometry, ModelGeometry
from engine.rope_spec import Rope

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # of clamped_swiglu


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax attention over keys and values."""

    rope: Rope
    scale: float  # of query-key products
    window: int | None = None  # positions that a token sees, its own included; None: all
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)
    has_sinks: bool = False  # a learned score per head takes part in the softmax, without a value
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False  # RMS norm of every query and key head before the rotation


@dataclass(frozen=True)
class LatentAttentionSpec:
    """Softmax attention over keys and values made of latents, which the KV cache holds in their place."""

    rope: Rope
    scale: float  # of query-key products
    sizes: LatentGeometry
    norm_eps: float = 1e-6  # of latents and of what queries are made of


@dataclass(frozen=True)
class MlpSpec:
    """act(gate(x)) * up(x), projected down."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True)
class RouterSpec:
    """Which experts a token goes to, and with what weights."""

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True  # the chosen experts' weights sum to one
    scale: float = 1.0  # of the weights in the end
    num_groups: int = 1  # of experts; only those of the best groups are chosen from
    num_groups_kept: int = 1
    bias: bool = False
    has_correction: bool = False  # added to scores for the choice, not to weights


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts, and what every token goes through besides."""

    router: RouterSpec
    expert: MlpSpec
    shared: MlpSpec | None = None
    fused_encoding: str = "plain"  # of stored tensors that hold all experts; see stored_encodings


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer."""

    attention: AttentionSpec | LatentAttentionSpec
    mlp: MlpSpec | MoeSpec
    norms_after: bool = False  # both halves' outputs are normed, too, before they are added


@dataclass(frozen=True)
class DecoderSpec:
    """What a family's module reads off a configuration."""

    layers: tuple[LayerSpec, ...]
    num_heads: int
    num_kv_heads: int  # of the KV cache
    head_dim: int  # of the KV cache
    norm_eps: float
    norm_offset: float = 0.0  # added to the weights of norms
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    encoding: str = "plain"  # of the matrices of layers, routers left out; see stored_encodings


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model. `max_model_len` counts prompt and output tokens."""

    architecture: str
    decoder: DecoderSpec
    hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_model_len: int
    dtype: str
    eos_token_ids: frozenset[int]
    revision: str  # equal for equal configuration and weights; see `checkpoint_revision`
    geometry: ModelGeometry  # what memory and splitting depend on

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.decoder.layers)

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, biases and norms left out."""
        return self.geometry.num_parameters

    def kv_layout(self, tensor_parallel: int, block_size: int, pipeline_parallel: int = 1) -> KVLayout:
        """Raises ConfigurationError when the model cannot be split that way."""
        return self.geometry.kv_layout(tensor_parallel, block_size, pipeline_parallel)
