"""How fast one replica's engine computes, beside what bounds it.

A step reads every weight once whatever the batch and multiplies it with every token. It cannot be shorter than (weight
bytes + KV bytes read) / bandwidth, which bounds decode in small batches, nor than 2 * parameters FLOP per token at the
rate of matrix products, which bounds prefill. Both limits are measured in the same run, with the same threads:
bandwidth as the best of a large copy-free read, arithmetic as the best large matmul of the same dtype, or of float32
where the CPU is faster with that.

Peers generate from the same checkpoint and the same prompts, in turns with us; medians count. Their decode time is that
of all tokens less that of the first. Shapes apart, peers other than transformers want a checkpoint with a tokenizer:

    python -m bench.engine --checkpoint DIR --openvino-python PATH --openvino-model DIR.f16.gguf --vllm-python PATH
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from bench.engine_peers import EnginePeer, PeerSettings, started_peers
from bench.random_checkpoint import SHAPES, write_random_checkpoint
from bench.report import print_json, print_table
from core.kv_layout import DTYPE_BYTES
from engine.arithmetic import arithmetic_dtype
from engine.batch import Draw, SequenceStep, StepBatch
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.model_spec import ModelSpec
from engine.rank_group import SingleRank
from engine.runner import ModelRunner
from engine.weights import TORCH_DTYPES

OURS = "baton"
GREEDY = Draw(temperature=0.0, top_p=1.0, top_k=0, seed=0)


@dataclass(frozen=True)
class Measured:
    """One line of the table; `limit` is in tokens/s too."""

    phase: str
    size: int  # sequences of a decode batch, tokens of a prompt
    tokens_per_s: float
    limit: float
    peers: dict[str, float]  # their tokens/s

    @property
    def ratios(self) -> dict[str, float]:
        """To the limit and to each peer."""
        others = {"limit": self.limit} | self.peers
        return {name: round(self.tokens_per_s / rate, 2) for name, rate in others.items()}


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


def prompt_batch(prompts: list[list[int]], blocks_each: int) -> StepBatch:
    """Whole prompts, each with blocks of its own."""
    return StepBatch(
        tuple(
            SequenceStep(tuple(prompt), 0, tuple(range(i * blocks_each, (i + 1) * blocks_each)), GREEDY)
            for i, prompt in enumerate(prompts)
        )
    )


def generate(runner: ModelRunner, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds of the decode steps alone, after a prefill of all prompts."""
    blocks_each = runner.layout.num_blocks_for(len(prompts[0]) + num_tokens)
    batch = prompt_batch(prompts, blocks_each)
    result = runner.collect(runner.launch(batch))
    started = time.perf_counter()
    for _ in range(num_tokens - 1):
        batch = StepBatch(
            tuple(
                SequenceStep((token,), old.first_position + len(old.token_ids), old.block_table, GREEDY)
                for old, token in zip(batch.sequences, result.token_ids, strict=True)
                if token is not None
            )
        )
        result = runner.collect(runner.launch(batch))
    return time.perf_counter() - started


class EngineBench:
    """The engine and its peers, with prompts that all get."""

    def __init__(
        self, args: argparse.Namespace, checkpoint: Path, spec: ModelSpec, peers: Mapping[str, EnginePeer]
    ) -> None:
        self._args, self._spec, self._peers = args, spec, peers
        self._device = torch.device(args.device)
        self._generator = torch.Generator().manual_seed(args.seed)
        self._layout = spec.kv_layout(1, args.block_size)
        longest = max(*args.prefill, max(args.decode) * (args.prompt + args.output + args.block_size))
        num_blocks = self._layout.num_blocks_for(longest) + 1
        read = CheckpointReader(checkpoint, spec, self._device).read
        self._runner = ModelRunner(spec, read, self._layout, num_blocks, SingleRank(), self._device, args.threads)
        self._runner.warm_up()
        self.bandwidth = measure_bandwidth(self._device)
        self.flop_per_s = measure_matmul(self._device, TORCH_DTYPES[spec.dtype])
        self._embedding_size = spec.vocab_size * spec.hidden_size
        num_tables = 1 if spec.tie_word_embeddings else 2
        self._num_layer_parameters = spec.num_parameters - num_tables * self._embedding_size

    def decode(self, count: int) -> Measured:
        """Steps of `count` sequences. A step reads all weights but the embedding, of which it needs few rows."""
        prompts = self._prompts(count, self._args.prompt)
        num_steps = self._args.output - 1

        def peer_s(peer: EnginePeer) -> float:
            return peer.generate(prompts, num_steps + 1) - peer.generate(prompts, 1)

        times = self._in_turns(lambda: generate(self._runner, prompts, num_steps + 1), peer_s)
        num_read = self._num_layer_parameters + self._embedding_size  # the head's, of the embedding's size
        context = self._args.prompt + num_steps / 2
        kv_bytes = self._layout.block_bytes_per_rank / self._args.block_size * context
        read_s = (num_read * DTYPE_BYTES[self._spec.dtype] + count * kv_bytes) / self.bandwidth
        limit = count / max(read_s, count * 2 * num_read / self.flop_per_s)
        return self._measured("decode", count, count * num_steps, times, limit)

    def prefill(self, length: int) -> Measured:
        """One prompt. Every token meets all weights but embedding and head."""
        prompts = self._prompts(1, length)
        batch = prompt_batch(prompts, self._layout.num_blocks_for(length))
        times = self._in_turns(
            lambda: seconds(lambda: self._runner.collect(self._runner.launch(batch)), self._device, 1),
            lambda peer: peer.generate(prompts, 1),
        )
        return self._measured("prefill", length, length, times, self.flop_per_s / (2 * self._num_layer_parameters))

    def close(self) -> None:
        """Frees the engine."""
        self._runner.close()

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        ids: list[list[int]] = torch.randint(self._spec.vocab_size, (count, length), generator=self._generator).tolist()
        return ids

    def _in_turns(self, ours: Callable[[], float], peer_s: Callable[[EnginePeer], float]) -> dict[str, float]:
        """Median seconds of each, taken in turns so that a noisy machine disturbs all alike."""
        ways = {OURS: ours} | {name: partial(peer_s, peer) for name, peer in self._peers.items()}
        rounds = [{name: way() for name, way in ways.items()} for _ in range(self._args.repeats)]
        return {name: statistics.median(times[name] for times in rounds) for name in ways}

    def _measured(self, phase: str, size: int, num_tokens: int, times: dict[str, float], limit: float) -> Measured:
        rates = {name: num_tokens / median_s for name, median_s in times.items()}
        return Measured(phase, size, rates.pop(OURS), limit, rates)


def main() -> None:
    """Measures, prints a table and one JSON line."""
    args = parse()
    peers_asked = PeerSettings(args.peer, args.openvino_python, args.openvino_model, args.vllm_python)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or Path(folder)
        if args.checkpoint is None:
            write_random_checkpoint(checkpoint, SHAPES[args.shape], args.seed)
        spec = load_model_spec(checkpoint, args.dtype)
        dtype, device = TORCH_DTYPES[spec.dtype], torch.device(args.device)
        with started_peers(peers_asked, checkpoint, dtype, device, args.threads) as peers:
            bench = EngineBench(args, checkpoint, spec, peers)
            found = [bench.decode(count) for count in args.decode] + [bench.prefill(length) for length in args.prefill]
            bench.close()
    print(f"read {bench.bandwidth / 1e9:.1f} GB/s, matmul {bench.flop_per_s / 1e12:.2f} TFLOP/s")
    names = list(found[0].peers)
    heads = [head for name in names for head in (name, "ratio")]
    print_table(("phase", "size", "tokens/s", "of limit", *heads), [_row(line, names) for line in found])
    limits = {"read_bytes_per_s": bench.bandwidth, "flop_per_s": bench.flop_per_s}
    print_json("engine", args, limits=limits, results=[asdict(line) | {"ratios": line.ratios} for line in found])


def _row(line: Measured, names: list[str]) -> list[str]:
    peers = [cell for name in names for cell in (f"{line.peers[name]:.0f}", str(line.ratios[name]))]
    return [line.phase, str(line.size), f"{line.tokens_per_s:.0f}", str(line.ratios["limit"]), *peers]


def parse() -> argparse.Namespace:
    """Options."""
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
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="measure transformers too")
    parser.add_argument("--openvino-python", type=Path, help="interpreter with openvino-genai")
    parser.add_argument("--openvino-model", type=Path, help="the checkpoint as OpenVINO takes it")
    parser.add_argument("--vllm-python", type=Path, help="interpreter with vLLM's CPU build")
    return parser.parse_args()


if __name__ == "__main__":
    main()
