"""How fast one replica's engine computes, beside what bounds it.

Decode reads every weight once per step whatever the batch: it is bound by memory bandwidth, and a step cannot be
shorter than (weight bytes + KV bytes read) / bandwidth. Prefill multiplies every weight with every token: it is bound
by matrix arithmetic, 2 * parameters FLOP per token. Both limits are measured in the same run, with the same threads:
bandwidth as the best of a large copy-free read, arithmetic as the best large matmul of the same dtype, or of float32
where the CPU is faster with that.

`--by` names what computes: torch, FlashInfer, or FlashInfer with decode steps replayed from CUDA graphs. On CUDA, steps
of all kinds are first launched once where torch raises at whatever waits for the device. With `--device-weights-mib`
layers stream in from the host: then decode is bound by the bandwidth of that copy, which is measured, too.

`--peer` runs transformers' generate on the same checkpoint and the same prompts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from bench.random_checkpoint import SHAPES, random_parameters, write_hollow_checkpoint, write_random_checkpoint
from bench.report import print_json, print_table
from core.engine_config import EngineConfig
from core.kv_layout import DTYPE_BYTES, KVLayout
from engine.arithmetic import arithmetic_dtype
from engine.backend import choose_backend
from engine.batch import BlockTable, Draw, SequenceStep, StepBatch
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.model_spec import ModelSpec
from engine.parameters import ReadParameters
from engine.rank_group import SingleRank
from engine.runner import ModelRunner
from engine.weights import TORCH_DTYPES

GREEDY = Draw(temperature=0.0, top_p=1.0, top_k=0, seed=0)
SAMPLED = Draw(temperature=0.7, top_p=0.9, top_k=40, seed=0, num_logprobs=3)
MAX_PREFILL_TOKENS = 8192  # together, before decoding
BY = {
    "torch": EngineConfig(attention="torch", kernels="torch", graph_batch_sizes=()),
    "flashinfer": EngineConfig(attention="flashinfer", kernels="flashinfer", graph_batch_sizes=()),
    "graphs": EngineConfig(attention="flashinfer", kernels="flashinfer"),
}


@dataclass(frozen=True)
class Measured:
    """One line of the table; `limit` is in tokens/s too."""

    by: str
    phase: str
    size: int  # sequences of a decode batch, tokens of a prompt
    tokens_per_s: float
    limit: float
    peer_tokens_per_s: float | None = None

    @classmethod
    def of(
        cls, what: tuple[str, str, int], num_tokens: int, times: tuple[float, float | None], limit: float
    ) -> "Measured":
        """Rates from the seconds of the engine and of its peer. `what`: by, phase, size."""
        ours_s, peer_s = times
        return cls(*what, num_tokens / ours_s, limit, num_tokens / peer_s if peer_s else None)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Best wall time of `work`, the device idle before and after."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s of reading memory much larger than any cache."""
    data = torch.ones(1 << 27, dtype=torch.int64 if device.type == "cpu" else torch.float32, device=device)
    return data.nbytes / seconds(data.sum, device, 8)


def measure_upload(device: torch.device) -> float:
    """Bytes/s of copies from pinned host memory."""
    host = torch.ones(1 << 28, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    return host.nbytes / seconds(lambda: there.copy_(host, non_blocking=True), device, 4)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, in the precision that is quickest for numbers of `dtype`."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(arithmetic_dtype(device, dtype)) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 8)


def prompt_batch(prompts: list[list[int]], layout: KVLayout, num_tokens: int) -> StepBatch:
    """Whole prompts, each with blocks of its own for `num_tokens` tokens in every KV group."""
    num_blocks = layout.num_blocks_for(num_tokens)
    tables = (BlockTable(tuple(range(first, first + num_blocks))) for first in count(0, num_blocks))
    num_groups = len(layout.kv_groups)
    return StepBatch(
        tuple(SequenceStep(tuple(prompt), 0, tuple(islice(tables, num_groups)), GREEDY) for prompt in prompts)
    )


def generate(runner: ModelRunner, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds of the decode steps alone, after a prefill of all prompts."""
    batch = prompt_batch(prompts, runner.layout, len(prompts[0]) + num_tokens)
    token_ids = prefill_in_turns(runner, batch)
    started = time.perf_counter()
    for _ in range(num_tokens - 1):
        batch = StepBatch(
            tuple(
                SequenceStep((token,), old.first_position + len(old.token_ids), old.block_tables, GREEDY)
                for old, token in zip(batch.sequences, token_ids, strict=True)
                if token is not None
            )
        )
        token_ids = runner.collect(runner.launch(batch)).token_ids
    return time.perf_counter() - started


def prefill_in_turns(runner: ModelRunner, batch: StepBatch) -> tuple[int | None, ...]:
    """Whole prompts, as many at a time as a step takes; what they draw."""
    together = max(1, MAX_PREFILL_TOKENS // len(batch.sequences[0].token_ids))
    parts = (batch.sequences[first : first + together] for first in range(0, len(batch.sequences), together))
    return tuple(token for part in parts for token in runner.collect(runner.launch(StepBatch(part))).token_ids)


def what_waits(runner: ModelRunner) -> str:
    """What of a launch waits for the CUDA device; empty when nothing does. Uses the first blocks."""
    size = runner.layout.block_size
    tables = (BlockTable((0, 1)),) * len(runner.layout.kv_groups)
    prompt, later = SequenceStep((0,) * size, 0, tables, SAMPLED), SequenceStep((0,) * 5, size, tables, GREEDY)
    singles = tuple(SequenceStep((0,), size + i, tables, draw) for i, draw in enumerate((SAMPLED, GREEDY)))
    batches = ((prompt,), singles, (*singles, later, prompt))
    for batch in batches:  # what is set up on first use may wait
        runner.collect(runner.launch(StepBatch(batch)))
    for batch in batches:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = runner.launch(StepBatch(batch))
        except RuntimeError as error:
            return f"{len(batch)} sequences: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runner.collect(step)
    return ""


def peer_generate(model: Any, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds of transformers' generate."""
    ids = torch.tensor(prompts, device=model.device)
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "pad_token_id": 0}
    return seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings), model.device, 1)


def seen_bytes(layout: KVLayout, context: float) -> float:
    """KV that the token after `context` others attends to, in all layers."""
    bytes_per_token = layout.block_bytes_per_rank / layout.num_places / layout.block_size  # of one layer
    seen = (len(group.layers) * min(context, group.window or context) for group in layout.kv_groups)
    return bytes_per_token * sum(seen)


def load_peer(checkpoint: Path, dtype: str, device: torch.device) -> Any:
    """The same checkpoint in transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype=TORCH_DTYPES[dtype])
    return model.to(device).eval()


@dataclass(frozen=True)
class Limits:
    """Of the device, measured."""

    read_bytes_per_s: float
    flop_per_s: float
    upload_bytes_per_s: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Limits":
        """In some seconds."""
        return cls(measure_bandwidth(device), measure_matmul(device, dtype), measure_upload(device))


def is_hollow(args: argparse.Namespace) -> bool:
    """Whether random weights are made on the device, rather than read."""
    return args.checkpoint is None and not args.peer


class EngineBench:
    """The engine, computed by one of BY, and, if asked for, its peer, with prompts that both get."""

    def __init__(self, args: argparse.Namespace, checkpoint: Path, spec: ModelSpec, by: str, limits: "Limits") -> None:
        self._args, self._spec, self._by, self._limits = args, spec, by, limits
        self._device = torch.device(args.device)
        self._generator = torch.Generator().manual_seed(args.seed)
        self._layout = spec.kv_layout(1, args.block_size)
        longest = max(*args.prefill, max(args.decode) * (args.prompt + args.output + args.block_size))
        num_blocks = (self._layout.num_blocks_for(longest) + 1) * len(self._layout.kv_groups) + 1
        read: ReadParameters = (
            random_parameters(spec.dtype, self._device, args.seed)
            if is_hollow(args)
            else CheckpointReader(checkpoint, spec, self._device).read
        )
        config = BY[by].model_copy(update={"device_weights_mib": args.device_weights_mib})
        backend = choose_backend(config, spec, self._layout, self._device, max(args.decode, default=1))
        group, threads = SingleRank(), args.threads
        self._runner = ModelRunner(spec, read, self._layout, num_blocks, group, self._device, threads, backend=backend)
        started = time.perf_counter()
        self._runner.warm_up(max(args.prefill, default=0))
        self.warm_up_s = time.perf_counter() - started
        self.waits = what_waits(self._runner) if self._device.type == "cuda" else ""
        self._peer = load_peer(checkpoint, spec.dtype, self._device) if args.peer else None
        self._embedding_size = spec.vocab_size * spec.hidden_size

    def decode(self, num_sequences: int) -> Measured:
        """Steps of so many sequences. A step reads all weights but the embedding, of which it needs few rows."""
        prompts = self._prompts(num_sequences, self._args.prompt)
        num_steps = self._args.output - 1

        def peer_s() -> float:
            return peer_generate(self._peer, prompts, num_steps + 1) - peer_generate(self._peer, prompts, 1)

        times = self._in_turns(lambda: generate(self._runner, prompts, num_steps + 1), peer_s)
        weight_bytes = (self._spec.num_parameters - self._embedding_size) * DTYPE_BYTES[self._spec.dtype]
        context = self._args.prompt + num_steps / 2
        kv_bytes = seen_bytes(self._layout, context)
        stream = self._runner.weights.stream
        streamed_bytes = 0 if stream is None else stream.host_bytes
        read_s = (weight_bytes - streamed_bytes + num_sequences * kv_bytes) / self._limits.read_bytes_per_s
        step_s = max(read_s, streamed_bytes / self._limits.upload_bytes_per_s)
        return Measured.of(
            (self._by, "decode", num_sequences), num_sequences * num_steps, times, num_sequences / step_s
        )

    def prefill(self, length: int) -> Measured:
        """One prompt. Every token meets all weights but embedding and head, and half of the prompt twice: its keys and
        its values.
        """
        prompts = self._prompts(1, length)
        batch = prompt_batch(prompts, self._layout, length)
        times = self._in_turns(
            lambda: seconds(lambda: self._runner.collect(self._runner.launch(batch)), self._device, 1),
            lambda: peer_generate(self._peer, prompts, 1),
        )
        decoder = self._spec.decoder
        seen = 2 * length * decoder.num_heads * decoder.head_dim * len(decoder.layers)
        flop = 2 * (self._spec.num_parameters - 2 * self._embedding_size) + seen
        return Measured.of((self._by, "prefill", length), length, times, self._limits.flop_per_s / flop)

    def close(self) -> None:
        """Frees the engine."""
        self._runner.close()

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        ids: list[list[int]] = torch.randint(self._spec.vocab_size, (count, length), generator=self._generator).tolist()
        return ids

    def _in_turns(self, ours: Callable[[], float], peer: Callable[[], float]) -> tuple[float, float | None]:
        """The best seconds of each, taken in turns so that a noisy machine disturbs both alike."""
        pairs = [(ours(), peer() if self._peer is not None else None) for _ in range(self._args.repeats)]
        peers = [peer_s for _, peer_s in pairs if peer_s is not None]
        return min(ours_s for ours_s, _ in pairs), min(peers) if peers else None


def main() -> None:
    """Measures, prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="instead of random weights")
    parser.add_argument("--shape", choices=SHAPES, default="160m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 4, 16], help="batch sizes")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048], help="prompt lengths")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens before decoding")
    parser.add_argument("--output", type=int, default=64, help="tokens decoded")
    parser.add_argument("--repeats", type=int, default=3, help="the best counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by", nargs="+", choices=BY, default=["torch"], help="what computes")
    parser.add_argument("--device-weights-mib", type=int, help="weights beyond it stream in from the host")
    parser.add_argument("--peer", action="store_true", help="measure transformers too")
    args = parser.parse_args()
    found: list[Measured] = []
    starts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or Path(folder)
        if is_hollow(args):
            write_hollow_checkpoint(checkpoint, SHAPES[args.shape])
        elif args.checkpoint is None:
            write_random_checkpoint(checkpoint, SHAPES[args.shape], args.seed)
        spec = load_model_spec(checkpoint, args.dtype)
        limits = Limits.measure(torch.device(args.device), TORCH_DTYPES[spec.dtype])
        for by in args.by:
            bench = EngineBench(args, checkpoint, spec, by, limits)
            found += [bench.decode(count) for count in args.decode]
            found += [bench.prefill(length) for length in args.prefill]
            starts[by] = {"warm_up_s": round(bench.warm_up_s, 2), "waits": bench.waits}
            bench.close()
    report(limits, starts, found)
    results = [vars(line) | {"ratio_to_limit": line.tokens_per_s / line.limit} for line in found]
    print_json("engine", args, limits=vars(limits), starts=starts, results=results)


def report(limits: Limits, starts: dict[str, dict[str, Any]], found: list[Measured]) -> None:
    """Tables."""
    print(
        f"read {limits.read_bytes_per_s / 1e9:.1f} GB/s, matmul {limits.flop_per_s / 1e12:.2f} TFLOP/s, "
        f"from the host {limits.upload_bytes_per_s / 1e9:.1f} GB/s"
    )
    for by, start in starts.items():
        print(
            f"{by}: warm-up {start['warm_up_s']} s" + (f"; a launch waits: {start['waits']}" if start["waits"] else "")
        )
    head = ("by", "phase", "size", "tokens/s", "limit", "of limit", "transformers")
    rows = [
        (
            line.by,
            line.phase,
            str(line.size),
            f"{line.tokens_per_s:.0f}",
            f"{line.limit:.0f}",
            f"{line.tokens_per_s / line.limit:.2f}",
            "-" if line.peer_tokens_per_s is None else f"{line.peer_tokens_per_s:.0f}",
        )
        for line in found
    ]
    print_table(head, rows)


if __name__ == "__main__":
    main()
