"""What one rank holds of a model: its parameters in the order in which they are loaded, cut out of stored tensors.

Column-split matrices (QKV, gate/up, embedding, head) are cut along their outputs, row-split ones (attention output,
MLP down) along their inputs. KV heads are replicated when there are more ranks than heads; what comes down to latents
is the same on every rank. Experts are split like other MLPs, or, as whole experts, shared out between the ranks.
All of this is between the ranks of one stage of a pipeline; a stage has its own layers alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from core.kv_layout import KVLayout
from engine.model_spec import AttentionSpec, LatentAttentionSpec, MlpSpec, ModelSpec, MoeSpec
from engine.models.registry import FAMILIES
from engine.parameters import WHOLE, Parameter, Part, stacked
from engine.stored_names import StoredNames


@dataclass(frozen=True)
class Share:
    """Which part of a model one rank holds."""

    rank: int  # of the replica
    layout: KVLayout
    whole_experts: bool = False

    @property
    def part(self) -> int:
        """The rank's number within its stage."""
        return self.layout.part_of(self.rank)

    @property
    def layers(self) -> range:
        """Of the rank's stage."""
        return self.layout.layers_of_stage(self.layout.stage_of(self.rank))

    @property
    def is_first(self) -> bool:
        """Whether the rank embeds tokens."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the rank makes logits."""
        return self.layers.stop == self.layout.num_layers

    def of(self, total: int) -> range:
        """The rank's part of so many rows, columns or experts."""
        size = self.layout.tensor_parallel
        return range(total * self.part // size, total * (self.part + 1) // size)

    def experts(self, total: int) -> range:
        """Those that the rank has a part of."""
        return self.of(total) if self.whole_experts else range(total)


def list_parameters(spec: ModelSpec, share: Share) -> tuple[Parameter, ...]:
    """All of one rank, the largest last. Embedding and head hold the rows [part * rows, (part + 1) * rows) of the
    vocabulary. Where the embedding is the head, the last stage has it as well as the first.
    """
    names = FAMILIES[spec.architecture].names
    found: list[Parameter] = []
    for index in share.layers:
        found += _Layer(spec, share, names, index).parameters()
    if share.is_last:
        found.append(stacked("final_norm", Part("model.norm.weight", (spec.hidden_size,))))
    if share.is_first or (share.is_last and spec.tie_word_embeddings):
        found.append(_vocabulary("embedding", "model.embed_tokens.weight", spec, share))
    if share.is_last and not spec.tie_word_embeddings:
        found.append(_vocabulary("head", "lm_head.weight", spec, share))
    return tuple(found)


class _Layer:
    """The parameters of one decoder layer."""

    def __init__(self, spec: ModelSpec, share: Share, names: StoredNames, index: int) -> None:
        self._spec = spec
        self._share = share
        self._names = names
        self._layer = spec.decoder.layers[index]
        self._stored = f"model.layers.{index}."
        self._name = f"layers.{index}."

    def parameters(self) -> Iterator[Parameter]:
        """In the order in which weights are put together."""
        names, hidden, layer = self._names, self._spec.hidden_size, self._layer
        yield self._vector("attention_norm", f"{names.attention_norm}.weight", hidden)
        if isinstance(layer.attention, LatentAttentionSpec):
            yield from self._latent_attention(layer.attention)
        else:
            yield from self._attention(layer.attention)
        if layer.norms_after:
            yield self._vector("attention_norm_after", f"{names.attention_norm_after}.weight", hidden)
        yield self._vector("mlp_norm", f"{names.mlp_norm}.weight", hidden)
        if isinstance(layer.mlp, MoeSpec):
            yield from self._mixture(layer.mlp)
        else:
            inner = self._share.of(layer.mlp.intermediate_size)
            yield from self._mlp("", names.gate_up, names.down, layer.mlp, inner, self._share.part == 0)
        if layer.norms_after:
            yield self._vector("mlp_norm_after", f"{names.mlp_norm_after}.weight", hidden)

    def _attention(self, attention: AttentionSpec) -> Iterator[Parameter]:
        decoder, names, share = self._spec.decoder, self._names, self._share
        head_dim, heads = decoder.head_dim, share.layout.heads_of_rank(share.rank)
        query_size, kv_size = decoder.num_heads * head_dim, decoder.num_kv_heads * head_dim
        query_rows, kv_rows = share.of(query_size), range(heads.start * head_dim, heads.stop * head_dim)
        sizes, rows = (query_size, kv_size, kv_size), (query_rows, kv_rows, kv_rows)
        yield from self._column_split("qkv", names.qkv, sizes, rows, attention.qkv_bias)
        if attention.qk_norm:
            yield self._vector("query_norm", f"{names.query_norm}.weight", head_dim)
            yield self._vector("key_norm", f"{names.key_norm}.weight", head_dim)
        if attention.has_sinks:
            yield self._vector("sinks", names.sinks, decoder.num_heads, share.of(decoder.num_heads))
        has_bias = attention.output_bias and share.part == 0
        yield from self._row_split("output", names.output, query_size, query_rows, has_bias)

    def _latent_attention(self, attention: LatentAttentionSpec) -> Iterator[Parameter]:
        """What comes down to latents is the same on every rank, what goes up to heads is split by head."""
        names, share, sizes = self._names, self._share, attention.sizes
        num_heads, rank, hidden = self._spec.decoder.num_heads, sizes.q_lora_rank, self._spec.hidden_size
        queries, made = num_heads * sizes.query_size, num_heads * sizes.made_size
        down = self._part(names.latent_down, (sizes.latent_size, hidden))
        if rank is None:
            yield self._stack("latent_down", down, self._part(names.query, (queries, hidden), share.of(queries)))
        else:
            yield self._stack("latent_down", down, self._part(names.query_down, (rank, hidden)))
            yield self._vector("query_norm", f"{names.query_down_norm}.weight", rank)
            yield self._stack("query_up", self._part(names.query_up, (queries, rank), share.of(queries)))
        yield self._vector("latent_norm", f"{names.latent_norm}.weight", sizes.kv_lora_rank)
        yield self._stack("latent_up", self._part(names.latent_up, (made, sizes.kv_lora_rank), share.of(made)))
        values = num_heads * sizes.v_head_dim
        yield from self._row_split("output", names.output, values, share.of(values), has_bias=False)

    def _mixture(self, mixture: MoeSpec) -> Iterator[Parameter]:
        names, share, router = self._names, self._share, mixture.router
        yield self._matrix("router", f"{names.router}.weight", router.num_experts, self._spec.hidden_size)
        if router.bias:
            yield self._vector("router_bias", f"{names.router}.bias", router.num_experts)
        if router.has_correction:
            correction = self._vector("correction", f"{names.router}.e_score_correction_bias", router.num_experts)
            yield replace(correction, dtype="float32")
        size = mixture.expert.intermediate_size
        inner = range(size) if share.whole_experts else share.of(size)
        adds_bias = share.whole_experts or share.part == 0
        for expert in share.experts(router.num_experts):
            if names.fused_gate_up:
                yield from self._fused_expert(expert, mixture, inner, adds_bias)
                continue
            gate_up = tuple(name.format(expert) for name in names.expert_gate_up)
            down = names.expert_down.format(expert)
            yield from self._mlp(f"experts.{expert}.", gate_up, down, mixture.expert, inner, adds_bias)
        if mixture.shared is not None:
            inner = share.of(mixture.shared.intermediate_size)
            yield from self._mlp(
                "shared.", names.shared_gate_up, names.shared_down, mixture.shared, inner, share.part == 0
            )

    def _fused_expert(self, expert: int, mixture: MoeSpec, inner: range, adds_bias: bool) -> Iterator[Parameter]:
        """Out of tensors that hold all experts, in which the outputs of gate and up take turns."""
        hidden, size, has_bias = self._spec.hidden_size, mixture.expert.intermediate_size, mixture.expert.bias
        gate_up, down = self._stored + self._names.fused_gate_up, self._stored + self._names.fused_down
        name, part = f"experts.{expert}.", partial(Part, expert=expert, num_experts=mixture.router.num_experts)
        matrix = partial(part, encoding=mixture.fused_encoding)
        turns = [range(2 * inner.start + turn, 2 * inner.stop, 2) for turn in (0, 1)]
        yield self._stack(f"{name}gate_up", *(matrix(gate_up, (2 * size, hidden), rows) for rows in turns))
        if has_bias:
            yield self._stack(f"{name}gate_up_bias", *(part(f"{gate_up}_bias", (2 * size,), rows) for rows in turns))
        yield self._stack(f"{name}down", matrix(down, (hidden, size), columns=inner))
        if has_bias and adds_bias:
            yield self._stack(f"{name}down_bias", part(f"{down}_bias", (hidden,)))

    def _mlp(
        self, name: str, gate_up: tuple[str, ...], down: str, mlp: MlpSpec, inner: range, adds_bias: bool
    ) -> Iterator[Parameter]:
        size = mlp.intermediate_size
        yield from self._column_split(f"{name}gate_up", gate_up, (size, size), (inner, inner), mlp.bias)
        yield from self._row_split(f"{name}down", down, size, inner, mlp.bias and adds_bias)

    def _column_split(
        self, name: str, stored: tuple[str, ...], sizes: Sequence[int], rows: Sequence[range], has_bias: bool
    ) -> Iterator[Parameter]:
        """Matrices of so many outputs each, of which the rank takes rows; stored apart, or stacked as one."""
        firsts = [0] * len(sizes)
        if len(stored) == 1:
            firsts = [sum(sizes[:number]) for number in range(len(sizes))]
            stored, sizes = stored * len(sizes), [sum(sizes)] * len(sizes)
        taken = [range(first + part.start, first + part.stop) for first, part in zip(firsts, rows, strict=True)]
        found = list(zip(stored, sizes, taken, strict=True))
        hidden = self._spec.hidden_size
        yield self._stack(name, *(self._part(at, (size, hidden), part) for at, size, part in found))
        if has_bias:
            biases = (Part(f"{self._stored}{at}.bias", (size,), part) for at, size, part in found)
            yield self._stack(f"{name}_bias", *biases)

    def _row_split(self, name: str, stored: str, size: int, columns: range, has_bias: bool) -> Iterator[Parameter]:
        """The ranks' products are summed, so only one of them adds the bias."""
        hidden = self._spec.hidden_size
        yield self._stack(name, self._part(stored, (hidden, size), columns=columns))
        if has_bias:
            yield self._vector(f"{name}_bias", f"{stored}.bias", hidden)

    def _part(self, stored: str, shape: tuple[int, int], rows: range = WHOLE, columns: range = WHOLE) -> Part:
        """Of a matrix as the checkpoint encodes them."""
        return Part(f"{self._stored}{stored}.weight", shape, rows, columns, self._spec.decoder.encoding)

    def _vector(self, name: str, stored: str, size: int, rows: range = WHOLE) -> Parameter:
        return self._stack(name, Part(self._stored + stored, (size,), rows))

    def _matrix(self, name: str, stored: str, rows: int, columns: int) -> Parameter:
        return self._stack(name, Part(self._stored + stored, (rows, columns)))

    def _stack(self, name: str, *parts: Part) -> Parameter:
        return stacked(self._name + name, *parts)


def _vocabulary(name: str, stored: str, spec: ModelSpec, share: Share) -> Parameter:
    num_rows = -(-spec.vocab_size // share.layout.tensor_parallel)
    rows = range(min(share.part * num_rows, spec.vocab_size), min((share.part + 1) * num_rows, spec.vocab_size))
    parts = (Part(stored, (spec.vocab_size, spec.hidden_size), rows),) if rows else ()
    return Parameter(name, (num_rows, spec.hidden_size), parts)
