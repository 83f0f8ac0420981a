"""How fast one replica's engine computes, beside what bounds it.

Decode reads every weight once per step whatever the batch: it is bound by memory bandwidth, and a step cannot be
shorter than (weight bytes + KV bytes read) / bandwidth. Prefill multiplies every weight with every token: it is bound
by matrix arithmetic, 2 * parameters FLOP per token. Both limits are measured in the same run, with the same threads:
bandwidth as the best of a large copy-free read, arithmetic as the best large matmul of the same dtype, or of float32
where the CPU is faster with that.

`--by` names what computes: torch, FlashInfer, or FlashInfer with decode steps replayed from CUDA graphs. On CUDA, steps
of all kinds are first launched once where torch raises at whatever waits for the device. With `--device-weights-mib`
layers stream in from the host: then decode is bound by the bandwidth of that copy, which is measured, too.

Peers generate from the same checkpoint and the same prompts, in turns with us; medians count. Their decode time is that
of all tokens less that of the first. Shapes apart, peers other than transformers (`--peer`) want a checkpoint with a
tokenizer:

    python -m bench.engine --checkpoint DIR --openvino-python PATH --openvino-model DIR.f16.gguf --vllm-python PATH
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from bench.engine_limits import Limits, seconds
from bench.engine_peers import EnginePeer, PeerSettings, started_peers
from bench.random_checkpoint import SHAPES, random_parameters, write_hollow_checkpoint, write_random_checkpoint
from bench.report import print_json, print_table
from core.engine_config import EngineConfig
from core.kv_layout import DTYPE_BYTES, KVLayout
from engine.backend import choose_backend
from engine.batch import BlockTable, Draw, SequenceStep, StepBatch
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.model_spec import ModelSpec
from engine.parameters import ReadParameters
from engine.rank_links import RankLinks
from engine.runner import ModelRunner
from engine.weights import TORCH_DTYPES

OURS = "baton"
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
    peers: dict[str, float]  # their tokens/s

    @property
    def ratios(self) -> dict[str, float]:
        """To the limit and to each peer."""
        others = {"limit": self.limit} | self.peers
        return {name: round(self.tokens_per_s / rate, 2) for name, rate in others.items()}


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


def seen_bytes(layout: KVLayout, context: float) -> float:
    """KV that the token after `context` others attends to, in all layers."""
    bytes_per_token = layout.cell_bytes / layout.block_size  # of one layer
    seen = (len(group.layers) * min(context, group.window or context) for group in layout.kv_groups)
    return bytes_per_token * sum(seen)


def is_hollow(args: argparse.Namespace) -> bool:
    """Whether random weights are made on the device, rather than read."""
    return args.checkpoint is None and not args.peer and args.openvino_python is None and args.vllm_python is None


class EngineBench:
    """The engine, computed by one of BY, and its peers, with prompts that all get."""

    def __init__(
        self,
        args: argparse.Namespace,
        checkpoint: Path,
        spec: ModelSpec,
        by: str,
        limits: Limits,
        peers: Mapping[str, EnginePeer],
    ) -> None:
        self._args, self._spec, self._by, self._limits, self._peers = args, spec, by, limits, peers
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
        links, threads = RankLinks(), args.threads
        self._runner = ModelRunner(spec, read, self._layout, num_blocks, links, self._device, threads, backend=backend)
        started = time.perf_counter()
        self._runner.warm_up(max(args.prefill, default=0))
        self.warm_up_s = time.perf_counter() - started
        self.waits = what_waits(self._runner) if self._device.type == "cuda" else ""
        self._embedding_size = spec.vocab_size * spec.hidden_size
        num_tables = 1 if spec.tie_word_embeddings else 2
        self._num_layer_parameters = spec.num_parameters - num_tables * self._embedding_size

    def decode(self, num_sequences: int) -> Measured:
        """Steps of so many sequences. A step reads all weights but the embedding, of which it needs few rows."""
        prompts = self._prompts(num_sequences, self._args.prompt)
        num_steps = self._args.output - 1

        def peer_s(peer: EnginePeer) -> float:
            return peer.generate(prompts, num_steps + 1) - peer.generate(prompts, 1)

        times = self._in_turns(lambda: generate(self._runner, prompts, num_steps + 1), peer_s)
        num_read = self._num_layer_parameters + self._embedding_size  # the head's, of the embedding's size
        context = self._args.prompt + num_steps / 2
        kv_bytes = seen_bytes(self._layout, context)
        stream = self._runner.weights.stream
        streamed_bytes = 0 if stream is None else stream.host_bytes
        resident_bytes = num_read * DTYPE_BYTES[self._spec.dtype] - streamed_bytes
        step_s = max(
            (resident_bytes + num_sequences * kv_bytes) / self._limits.read_bytes_per_s,
            num_sequences * 2 * num_read / self._limits.flop_per_s,
            streamed_bytes / self._limits.upload_bytes_per_s,
        )
        return self._measured("decode", num_sequences, num_sequences * num_steps, times, num_sequences / step_s)

    def prefill(self, length: int) -> Measured:
        """One prompt. Every token meets all weights but embedding and head, and half of the prompt twice: its keys and
        its values.
        """
        prompts = self._prompts(1, length)
        batch = prompt_batch(prompts, self._layout, length)
        times = self._in_turns(
            lambda: seconds(lambda: self._runner.collect(self._runner.launch(batch)), self._device, 1),
            lambda peer: peer.generate(prompts, 1),
        )
        decoder = self._spec.decoder
        seen = 2 * length * decoder.num_heads * decoder.head_dim * len(decoder.layers)
        flop = 2 * self._num_layer_parameters + seen
        return self._measured("prefill", length, length, times, self._limits.flop_per_s / flop)

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
        return Measured(self._by, phase, size, rates.pop(OURS), limit, rates)


def main() -> None:
    """Measures, prints tables and one JSON line."""
    args = parse()
    peers_asked = PeerSettings(args.peer, args.openvino_python, args.openvino_model, args.vllm_python)
    found: list[Measured] = []
    starts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or Path(folder)
        if is_hollow(args):
            write_hollow_checkpoint(checkpoint, SHAPES[args.shape])
        elif args.checkpoint is None:
            write_random_checkpoint(checkpoint, SHAPES[args.shape], args.seed)
        spec = load_model_spec(checkpoint, args.dtype)
        dtype, device = TORCH_DTYPES[spec.dtype], torch.device(args.device)
        limits = Limits.measure(device, dtype)
        with started_peers(peers_asked, checkpoint, dtype, device, args.threads) as peers:
            for by in args.by:
                bench = EngineBench(args, checkpoint, spec, by, limits, peers)
                found += [bench.decode(count) for count in args.decode]
                found += [bench.prefill(length) for length in args.prefill]
                starts[by] = {"warm_up_s": round(bench.warm_up_s, 2), "waits": bench.waits}
                bench.close()
    report(limits, starts, found)
    results = [asdict(line) | {"ratios": line.ratios} for line in found]
    print_json("engine", args, limits=asdict(limits), starts=starts, results=results)


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
    parser.add_argument("--by", nargs="+", choices=BY, default=["torch"], help="what computes")
    parser.add_argument("--device-weights-mib", type=int, help="weights beyond it stream in from the host")
    parser.add_argument("--peer", action="store_true", help="measure transformers too")
    parser.add_argument("--openvino-python", type=Path, help="interpreter with openvino-genai")
    parser.add_argument("--openvino-model", type=Path, help="the checkpoint as OpenVINO takes it")
    parser.add_argument("--vllm-python", type=Path, help="interpreter with vLLM's CPU build")
    return parser.parse_args()


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
    names = list(found[0].peers) if found else []
    heads = [head for name in names for head in (name, "ratio")]
    print_table(("by", "phase", "size", "tokens/s", "limit", "of limit", *heads), [_row(line, names) for line in found])


def _row(line: Measured, names: list[str]) -> list[str]:
    peers = [cell for name in names for cell in (f"{line.peers[name]:.0f}", str(line.ratios[name]))]
    ours = f"{line.tokens_per_s:.0f}", f"{line.limit:.0f}", str(line.ratios["limit"])
    return [line.by, line.phase, str(line.size), *ours, *peers]


if __name__ == "__main__":
    main()
