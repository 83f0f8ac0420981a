"""How fast one replica's engine computes, beside what bounds it.

Decode reads every weight once per step whatever the batch: it is bound by memory bandwidth, and a step cannot be
shorter than (weight bytes + KV bytes read) / bandwidth. Prefill multiplies every weight with every token: it is bound
by matrix arithmetic, 2 * parameters FLOP per token. Both limits are measured in the same run, with the same threads:
bandwidth as the best of a large copy-free read, arithmetic as the best large matmul of the same dtype, or of float32
where the CPU is faster with that.

`--peer` runs transformers' generate on the same checkpoint and the same prompts.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from bench.random_checkpoint import SHAPES, write_random_checkpoint
from core.kv_layout import DTYPE_BYTES, KVLayout
from engine.arithmetic import arithmetic_dtype
from engine.batch import BlockTable, Draw, SequenceStep, StepBatch
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.model_spec import ModelSpec
from engine.rank_group import SingleRank
from engine.runner import ModelRunner
from engine.weights import TORCH_DTYPES

GREEDY = Draw(temperature=0.0, top_p=1.0, top_k=0, seed=0)


@dataclass(frozen=True)
class Measured:
    """One line of the table; `limit` is in tokens/s too."""

    phase: str
    size: int  # sequences of a decode batch, tokens of a prompt
    tokens_per_s: float
    limit: float
    peer_tokens_per_s: float | None = None

    @classmethod
    def of(cls, phase: str, size: int, num_tokens: int, times: tuple[float, float | None], limit: float) -> "Measured":
        """Rates from the seconds of the engine and of its peer."""
        ours_s, peer_s = times
        return cls(phase, size, num_tokens / ours_s, limit, num_tokens / peer_s if peer_s else None)


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
    result = runner.collect(runner.launch(batch))
    started = time.perf_counter()
    for _ in range(num_tokens - 1):
        batch = StepBatch(
            tuple(
                SequenceStep((token,), old.first_position + len(old.token_ids), old.block_tables, GREEDY)
                for old, token in zip(batch.sequences, result.token_ids, strict=True)
                if token is not None
            )
        )
        result = runner.collect(runner.launch(batch))
    return time.perf_counter() - started


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


class EngineBench:
    """The engine and, if asked for, its peer, with prompts that both get."""

    def __init__(self, args: argparse.Namespace, checkpoint: Path, spec: ModelSpec) -> None:
        self._args, self._spec = args, spec
        self._device = torch.device(args.device)
        self._generator = torch.Generator().manual_seed(args.seed)
        self._layout = spec.kv_layout(1, args.block_size)
        longest = max(*args.prefill, max(args.decode) * (args.prompt + args.output + args.block_size))
        num_blocks = (self._layout.num_blocks_for(longest) + 1) * len(self._layout.kv_groups)
        read = CheckpointReader(checkpoint, spec, self._device).read
        self._runner = ModelRunner(spec, read, self._layout, num_blocks, SingleRank(), self._device, args.threads)
        self._runner.warm_up()
        self._peer = load_peer(checkpoint, spec.dtype, self._device) if args.peer else None
        self.bandwidth = measure_bandwidth(self._device)
        self.flop_per_s = measure_matmul(self._device, TORCH_DTYPES[spec.dtype])
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
        limit = num_sequences * self.bandwidth / (weight_bytes + num_sequences * kv_bytes)
        return Measured.of("decode", num_sequences, num_sequences * num_steps, times, limit)

    def prefill(self, length: int) -> Measured:
        """One prompt. Every token meets all weights but embedding and head."""
        prompts = self._prompts(1, length)
        batch = prompt_batch(prompts, self._layout, length)
        times = self._in_turns(
            lambda: seconds(lambda: self._runner.collect(self._runner.launch(batch)), self._device, 1),
            lambda: peer_generate(self._peer, prompts, 1),
        )
        limit = self.flop_per_s / (2 * (self._spec.num_parameters - 2 * self._embedding_size))
        return Measured.of("prefill", length, length, times, limit)

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
    parser.add_argument("--peer", action="store_true", help="measure transformers too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or Path(folder)
        if args.checkpoint is None:
            write_random_checkpoint(checkpoint, SHAPES[args.shape], args.seed)
        spec = load_model_spec(checkpoint, args.dtype)
        bench = EngineBench(args, checkpoint, spec)
        found = [bench.decode(count) for count in args.decode] + [bench.prefill(length) for length in args.prefill]
        bench.close()
    print(f"read {bench.bandwidth / 1e9:.1f} GB/s, matmul {bench.flop_per_s / 1e12:.2f} TFLOP/s")
    print(f"{'phase':8}{'size':>6}{'tokens/s':>10}{'of limit':>10}{'transformers':>14}")
    for line in found:
        peer = "-" if line.peer_tokens_per_s is None else f"{line.peer_tokens_per_s:.0f}"
        ratio = line.tokens_per_s / line.limit
        print(f"{line.phase:8}{line.size:>6}{line.tokens_per_s:>10.0f}{ratio:>10.2f}{peer:>14}")
    results = [vars(line) | {"ratio_to_limit": line.tokens_per_s / line.limit} for line in found]
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(
        json.dumps(
            {
                "benchmark": "engine",
                "config": config,
                "limits": {"read_bytes_per_s": bench.bandwidth, "flop_per_s": bench.flop_per_s},
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
