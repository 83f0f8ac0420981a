"""Executes steps on one rank's device: launch(batch) -> in flight -> collect() -> result.

The first rank leads: its `launch` tells the others, which iterate over `launches()`, what to compute. Stages of a
pipeline compute a step one after the other, so that several steps in flight keep all of them busy:

    stage 0   | n   | n+1 | n+2 |
    stage 1         | n   | n+1 | n+2 |
    collect               n     n+1   n+2       what the last stage drew
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.errors import ConfigurationError, PeerLost
from core.kv_layout import KVLayout
from core.sampling import TokenLogprobs
from core.weight_budget import num_resident_layers
from engine.attention import AttentionStep
from engine.backend import Backend, torch_backend
from engine.batch import BlockTable, Draw, SequenceStep, StepBatch, StepResult
from engine.decode_graphs import DecodeGraphs
from engine.decoder import Decoder
from engine.kv_cache import KVCache
from engine.model_parameters import Share, list_parameters
from engine.model_spec import ModelSpec
from engine.orders import KEEP_ALIVE, STEP, STOP, Orders, decode_orders
from engine.parameters import Parameter, ReadParameters
from engine.rank_links import RankLinks
from engine.sampler import Drawn, draw_tokens, logprobs_on_host
from engine.stage_reports import OnLayers, StageReports, await_drawn, await_reports
from engine.step_inputs import DrawAt, StepInputs, int_tensor, lay_out
from engine.weights import assemble


@dataclass
class InFlightStep:
    """A launched step. On CUDA, `written` holds an event per layer group that was not yet announced."""

    orders: Orders
    on_layers: OnLayers | None
    draws: tuple[DrawAt, ...] = ()
    written: list[tuple[torch.cuda.Event, int, int]] = field(default_factory=list)
    drawn: Drawn | None = None
    host_tensors: tuple[Tensor, ...] = ()
    finished: torch.cuda.Event | None = None


class ModelRunner:
    """One rank of a replica: weights, KV cache and its part of the forward pass. Used by one thread, but for `collect`.

    `num_threads` is set for the whole process. Where decode steps are recorded, one block less than `num_blocks` is to
    be had. Raises ConfigurationError when the ranks disagree about model or cache, or weights do not fit.
    """

    def __init__(
        self,
        spec: ModelSpec,
        read: ReadParameters,
        layout: KVLayout,
        num_blocks: int,
        links: RankLinks,
        device: torch.device,
        num_threads: int,
        whole_experts: bool = False,
        backend: Backend | None = None,
    ) -> None:
        """`backend` None: torch alone."""
        self._links, self._group, self._pipeline = links, links.group, links.pipeline
        assert (layout.tensor_parallel, layout.pipeline_parallel) == (self._group.size, self._pipeline.num_stages)
        torch.set_num_threads(num_threads)
        self.spec = spec
        self.layout = layout
        backend = backend or torch_backend(layout, device)
        self.num_blocks = num_blocks - 1 if backend.record is not None else num_blocks
        self._device = device
        self._require_agreement()
        with torch.inference_mode():
            self._share = share = Share(links.rank, layout, whole_experts)
            parameters = list_parameters(spec, share)
            named = zip((parameter.name for parameter in parameters), read(parameters), strict=True)
            num_resident = _num_resident(spec, share, parameters, backend.device_weight_bytes)
            self.weights = assemble(spec, share, device, named, backend.kernels, num_resident)
        self._decoder = Decoder(spec, share, self.weights, self._group, device, backend.kernels)
        self.kv_cache = KVCache(layout, links.rank, num_blocks, device)
        self._last: InFlightStep | None = None
        groups = layout.groups_of_stage(self._pipeline.stage)
        self._attention = backend.attention(self.kv_cache.tensor, groups)
        is_speaker = self._pipeline.stage > 0 and self._group.rank == 0
        self._reports = StageReports(self._pipeline) if is_speaker else None
        self._graphs: DecodeGraphs | None = None
        if backend.record is not None:
            assert self._pipeline.num_stages == 1, "a recorded step cannot wait for the stage before"
            longest = min(layout.num_blocks_for(spec.max_model_len), self.num_blocks)
            self._graphs = DecodeGraphs(backend.graph_sizes, self._decode, self._attention, longest, backend.record)

    # ---- the first rank -----------------------------------------------------------------------------------------

    def launch(
        self, batch: StepBatch, on_layers: OnLayers | None = None, layer_groups: Sequence[int] = ()
    ) -> InFlightStep:
        """Starts a step; on CPU it is then already computed. Raises PeerLost.

        `on_layers(first_layer, num_layers)` is called in this thread as soon as KV of these layers is written for the
        whole batch on all ranks: on CPU within `launch`, if the first stage has them; else within `collect`.
        `layer_groups`: the sizes of groups that are told of, in order; layers beyond them are not.
        """
        orders = Orders(batch, tuple(layer_groups) if on_layers is not None else ())
        if self._links.num_ranks > 1:
            self._links.tell(orders.encode())
        return self._execute(orders, on_layers)

    def collect(self, step: InFlightStep) -> StepResult:
        """Waits for a step and returns what it drew. For any thread; in the order of the launches. Raises PeerLost."""
        for event, first_layer, num_layers in step.written:
            event.synchronize()
            assert step.on_layers is not None
            step.on_layers(first_layer, num_layers)
        if step.finished is not None:
            step.finished.synchronize()
        if self._pipeline.num_stages > 1:
            await_reports(self._pipeline, self.layout, step.orders.group_sizes, step.on_layers)
            step.drawn = await_drawn(self._pipeline, step.draws)
            step.host_tensors = step.drawn.tensors() if step.drawn is not None else ()
        num_sequences = len(step.orders.batch.sequences)
        token_ids: list[int | None] = [None] * num_sequences
        logprobs: list[TokenLogprobs | None] = [None] * num_sequences
        if step.drawn is not None:
            drawn_logprobs = logprobs_on_host(step.drawn, step.host_tensors, step.draws)
            for at, token_id, logprob in zip(step.draws, step.host_tensors[0].tolist(), drawn_logprobs, strict=True):
                token_ids[at.sequence], logprobs[at.sequence] = token_id, logprob
        return StepResult(tuple(token_ids), tuple(logprobs))

    def warm_up(self, num_tokens: int = 0) -> None:
        """Computes a prompt of so many tokens, at least a block, a decode step, one that has both, and, the largest
        first, decode steps of all sizes that are recorded; so compilation, recording and lazy set-ups are over.

        Uses the first blocks, which KV groups write over each other: call before the cache holds anything.
        """
        draw = Draw(temperature=1.0, top_p=0.9, top_k=50, seed=0, num_logprobs=1)
        room = min(self.spec.max_model_len, self.num_blocks * self.layout.block_size) - 1
        length = min(max(num_tokens, self.layout.block_size), room)
        table = BlockTable(tuple(range(self.layout.num_blocks_for(length + 1))))
        tables = (table,) * len(self.layout.kv_groups)
        prompt, decode = SequenceStep((0,) * length, 0, tables, draw), SequenceStep((0,), length, tables, draw)
        batches = [(prompt,), (decode,), (decode, prompt)]
        if self._graphs is not None:
            batches += [(SequenceStep((0,), 0, tables, draw),) * size for size in reversed(self._graphs.sizes)]
        for batch in batches:
            self.collect(self.launch(StepBatch(batch)))

    def keep_alive(self) -> None:
        """Tells waiting ranks that the first one lives. While idle, call it more often than `max_silence_s`."""
        if self._links.num_ranks > 1:
            self._links.tell([KEEP_ALIVE])

    # ---- the other ranks ----------------------------------------------------------------------------------------

    def launches(self, max_silence_s: float = 30.0) -> Iterator[Orders]:
        """What the first rank launches, until that closes. Raises PeerLost, also when that is silent."""
        while True:
            values = self._links.hear(max_silence_s)
            if values[0] == STOP:
                return
            if values[0] == STEP:
                yield decode_orders(values)

    def execute_launched(self, orders: Orders) -> None:
        """This rank's part of a step that the first rank launched."""
        self._execute(orders, None)

    # ---- all ranks ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The first rank ends the others' `launches`; every rank frees its cache."""
        if self._links.num_ranks > 1 and self._links.rank == 0:
            with suppress(PeerLost):  # then nobody waits
                self._links.tell([STOP])
        if self._reports is not None:
            self._reports.close()
        self._links.close()
        self.kv_cache.close()
        if self.weights.stream is not None:
            self.weights.stream.close()

    def _require_agreement(self) -> None:
        rank, ours = self._links.rank, [self.num_blocks, int(self.spec.revision[:15], 16), self.layout.block_size]
        if self._links.num_ranks > 1 and rank == 0:
            self._links.tell([STEP, *ours])
        elif rank > 0 and (theirs := self._links.hear()[1:]) != ours:
            raise ConfigurationError(f"rank {rank} has blocks, revision, block size {ours}, not {theirs}")

    @torch.inference_mode()
    def _execute(self, orders: Orders, on_layers: OnLayers | None) -> InFlightStep:
        step, batch, group_sizes = InFlightStep(orders, on_layers), orders.batch, orders.group_sizes

        def layer_done(layer: int) -> None:
            num_layers = group_sizes.get(layer + 1)
            if num_layers is None:
                return
            first = layer + 1 - num_layers
            if self._reports is not None:
                self._reports.written(layer + 1, self._event())
            elif on_layers is not None and self._device.type == "cpu":
                on_layers(first, num_layers)
            elif on_layers is not None:
                step.written.append((_recorded_event(), first, num_layers))

        if self._graphs is not None and self._graphs.fits(batch):
            inputs, logits = self._graphs.run(batch, self.num_blocks, self._lay_out)
            for layer in range(self.spec.num_layers):
                layer_done(layer)
        else:
            inputs = self._lay_out(batch)
            logits = self._compute(inputs, layer_done)
        step.draws = inputs.draws
        self._last = step
        if logits is not None:
            step.drawn = draw_tokens(logits, inputs.draws)
            step.host_tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in step.drawn.tensors())
        step.finished = self._event()
        if self._reports is not None and self._share.is_last:
            self._reports.ended(step.host_tensors, step.finished)
        return step

    def _event(self) -> torch.cuda.Event | None:
        """After all that was launched so far; a CPU has computed it."""
        return _recorded_event() if self._device.type == "cuda" else None

    def _lay_out(self, batch: StepBatch) -> StepInputs:
        """With tokens that the step before draws, on the device; of several ranks the first one has them.

        The first stage of a pipeline has not, so that there no step may need them.
        """
        inputs, last = lay_out(batch, self._device), self._last
        if inputs.drawn:
            assert self._pipeline.num_stages == 1, "tokens are drawn on another stage"
            assert last is not None, "nothing was drawn before the first step"
            tokens = torch.zeros(len(last.draws), dtype=torch.int64, device=self._device)
            tokens = self._group.all_reduce(tokens if last.drawn is None else tokens + last.drawn.token_ids)
            number = {at.sequence: number for number, at in enumerate(last.draws)}
            rows = int_tensor([*inputs.drawn], self._device)
            taken = int_tensor([number[sequence] for sequence in inputs.drawn.values()], self._device)
            inputs.token_ids.index_copy_(0, rows, tokens.index_select(0, taken))
        return inputs

    def _compute(self, inputs: StepInputs, layer_done: Callable[[int], None]) -> Tensor | None:
        """Logits of the rows that draw, on the last stage."""
        attention = self._attention.plan(inputs)
        if self._share.is_first:
            hidden = self._decoder.embed(inputs.token_ids)
        else:
            hidden = self._decoder.room(len(inputs.token_ids))
            self._pipeline.receive(hidden)
        hidden = self._decoder.forward(hidden, inputs.positions, attention, layer_done)
        if not self._share.is_last:
            self._pipeline.send(hidden)
            return None
        return self._decoder.logits(hidden.index_select(0, inputs.draw_rows)) if inputs.draws else None

    def _decode(self, token_ids: Tensor, positions: Tensor, attention: AttentionStep) -> Tensor | None:
        """Logits of all rows."""
        hidden = self._decoder.embed(token_ids)
        return self._decoder.logits(self._decoder.forward(hidden, positions, attention, lambda _: None))


def _num_resident(spec: ModelSpec, share: Share, parameters: Sequence[Parameter], budget_bytes: int | None) -> int:
    """The share's layers whose weights stay on the device. Raises ConfigurationError."""
    layers, others = dict.fromkeys(share.layers, 0), 0
    for parameter in parameters:
        owner, *rest = parameter.name.split(".")
        if owner == "layers":
            layers[int(rest[0])] += parameter.num_bytes(spec.dtype)
        else:
            others += parameter.num_bytes(spec.dtype)
    return num_resident_layers([*layers.values()], others, budget_bytes)


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
