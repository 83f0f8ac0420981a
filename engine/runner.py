"""Executes steps on one rank's device: launch(batch) -> in flight -> collect() -> result.

The first rank leads: its `launch` tells the others, which iterate over `launches()`, what to compute.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from core.errors import ConfigurationError, PeerLost
from core.kv_layout import KVLayout
from core.sampling import TokenLogprobs
from engine.arithmetic import arithmetic_dtype
from engine.attention import AttentionBackend, TorchAttention
from engine.batch import Draw, SequenceStep, StepBatch, StepResult
from engine.batch_codec import decode_batch, encode_batch
from engine.cpu_attention import CACHED_DTYPES, CpuAttention
from engine.cpu_kernels import CpuKernels
from engine.cpu_library import load_cpu_library
from engine.decoder import Decoder
from engine.kernels import TorchKernels
from engine.kv_cache import KVCache
from engine.latent_attention import LatentAttention
from engine.model_parameters import Share, list_parameters
from engine.model_spec import ModelSpec
from engine.parameters import ReadParameters
from engine.rank_group import RankGroup
from engine.sampler import Drawn, draw_tokens, logprobs_on_host
from engine.step_inputs import DrawAt, lay_out
from engine.weights import TORCH_DTYPES, assemble

_STOP, _KEEP_ALIVE, _STEP = range(3)

OnLayers = Callable[[int, int], None]


@dataclass
class InFlightStep:
    """A launched step. On CUDA, `written` holds an event per layer group that was not yet announced."""

    num_sequences: int
    draws: tuple[DrawAt, ...]
    on_layers: OnLayers | None
    written: list[tuple[torch.cuda.Event, int, int]] = field(default_factory=list)
    drawn: Drawn | None = None
    host_tensors: tuple[Tensor, ...] = ()
    finished: torch.cuda.Event | None = None


class ModelRunner:
    """One rank of a replica: weights, KV cache and the forward pass. Used by one thread at a time.

    `num_threads` is set for the whole process. Raises ConfigurationError when the ranks disagree about model or cache.
    """

    def __init__(
        self,
        spec: ModelSpec,
        read: ReadParameters,
        layout: KVLayout,
        num_blocks: int,
        group: RankGroup,
        device: torch.device,
        num_threads: int,
        whole_experts: bool = False,
    ) -> None:
        assert layout.tensor_parallel == group.size
        torch.set_num_threads(num_threads)
        self.spec = spec
        self.layout = layout
        self.num_blocks = num_blocks
        self._group = group
        self._device = device
        self._require_agreement()
        library = load_cpu_library() if self._computes_in_float32() else None
        kernels = TorchKernels() if library is None else CpuKernels(library)
        with torch.inference_mode():
            share = Share(group.rank, layout, whole_experts)
            parameters = list_parameters(spec, share)
            named = zip((parameter.name for parameter in parameters), read(parameters), strict=True)
            self.weights = assemble(spec, share, device, named, kernels)
        self._decoder = Decoder(spec, layout, self.weights, group, kernels)
        self.kv_cache = KVCache(layout, group.rank, num_blocks, device)
        cache = self.kv_cache.tensor
        self._attention: AttentionBackend
        if layout.latent:
            self._attention = LatentAttention(cache)
        elif library is not None and cache.dtype in CACHED_DTYPES:
            self._attention = CpuAttention(library, cache)
        else:
            self._attention = TorchAttention(cache)

    # ---- the first rank -----------------------------------------------------------------------------------------

    def launch(
        self, batch: StepBatch, on_layers: OnLayers | None = None, layer_groups: Sequence[int] = ()
    ) -> InFlightStep:
        """Starts a step; on CPU it is then already computed. Raises PeerLost.

        `on_layers(first_layer, num_layers)` is called in this thread as soon as KV of these layers is written for the
        whole batch on all ranks: within `launch` on CPU, within `collect` on CUDA. `layer_groups`: the sizes of groups
        that are told of, in order; layers beyond them are not.
        """
        if self._group.size > 1:
            self._group.broadcast([_STEP, *encode_batch(batch)])
        return self._execute(batch, on_layers, layer_groups)

    def collect(self, step: InFlightStep) -> StepResult:
        """Waits for a step and returns what it drew."""
        for event, first_layer, num_layers in step.written:
            event.synchronize()
            assert step.on_layers is not None
            step.on_layers(first_layer, num_layers)
        if step.finished is not None:
            step.finished.synchronize()
        token_ids: list[int | None] = [None] * step.num_sequences
        logprobs: list[TokenLogprobs | None] = [None] * step.num_sequences
        if step.drawn is not None:
            drawn_logprobs = logprobs_on_host(step.drawn, step.host_tensors, step.draws)
            for at, token_id, logprob in zip(step.draws, step.host_tensors[0].tolist(), drawn_logprobs, strict=True):
                token_ids[at.sequence], logprobs[at.sequence] = token_id, logprob
        return StepResult(tuple(token_ids), tuple(logprobs))

    def warm_up(self) -> None:
        """Computes a prompt and one decode step in the first blocks, so that lazy initialisation is over.

        Call before the cache holds anything.
        """
        draw = Draw(temperature=1.0, top_p=0.9, top_k=0, seed=0)
        length = min(self.layout.block_size, self.spec.max_model_len - 1)
        blocks = tuple(range(self.layout.num_blocks_for(length + 1)))
        for step in (SequenceStep((0,) * length, 0, blocks, draw), SequenceStep((0,), length, blocks, draw)):
            self.collect(self.launch(StepBatch((step,))))

    def keep_alive(self) -> None:
        """Tells waiting ranks that the first one lives. While idle, call it more often than `max_silence_s`."""
        if self._group.size > 1:
            self._group.broadcast([_KEEP_ALIVE])

    # ---- the other ranks ----------------------------------------------------------------------------------------

    def launches(self, max_silence_s: float = 30.0) -> Iterator[StepBatch]:
        """What the first rank launches, until that closes. Raises PeerLost, also when that is silent."""
        while True:
            kind, *values = self._group.broadcast(None, max_silence_s)
            if kind == _STOP:
                return
            if kind == _STEP:
                yield decode_batch(values)

    def execute_launched(self, batch: StepBatch) -> None:
        """This rank's part of a step that the first rank launched."""
        self._execute(batch, None, ())

    # ---- all ranks ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The first rank ends the others' `launches`; every rank frees its cache."""
        if self._group.size > 1 and self._group.rank == 0:
            with suppress(PeerLost):  # then nobody waits
                self._group.broadcast([_STOP])
        self._group.close()
        self.kv_cache.close()

    def _require_agreement(self) -> None:
        if self._group.size > 1:
            ours = [self.num_blocks, int(self.spec.revision[:15], 16), self.layout.block_size]
            theirs = self._group.broadcast(ours if self._group.rank == 0 else None)
            if ours != theirs:
                raise ConfigurationError(
                    f"rank {self._group.rank} has blocks, revision, block size {ours}, not {theirs}"
                )

    def _computes_in_float32(self) -> bool:
        dtype = TORCH_DTYPES[self.spec.dtype]
        return self._device.type == "cpu" and arithmetic_dtype(self._device, dtype) == torch.float32

    @torch.inference_mode()
    def _execute(self, batch: StepBatch, on_layers: OnLayers | None, layer_groups: Sequence[int]) -> InFlightStep:
        inputs = lay_out(batch, self._device)
        step = InFlightStep(len(batch.sequences), inputs.draws, on_layers)

        group_sizes = dict(zip(accumulate(layer_groups), layer_groups, strict=True))  # by the layer after the group

        def layer_done(layer: int) -> None:
            num_layers = group_sizes.get(layer + 1)
            if on_layers is None or num_layers is None:
                return
            first = layer + 1 - num_layers
            if self._device.type == "cpu":
                on_layers(first, num_layers)
            else:
                step.written.append((_recorded_event(), first, num_layers))

        attention = self._attention.plan(inputs)
        hidden = self._decoder.forward(inputs.token_ids, inputs.positions, attention, layer_done)
        logits = self._decoder.logits(hidden.index_select(0, inputs.draw_rows)) if inputs.draws else None
        if logits is not None:
            step.drawn = draw_tokens(logits, inputs.draws)
            step.host_tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in step.drawn.tensors())
        if self._device.type == "cuda":
            step.finished = _recorded_event()
        return step


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
