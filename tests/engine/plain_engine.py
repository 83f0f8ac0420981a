"""Generates with a BlockPool and a ModelRunner alone: the least that must work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core.block_hash import chain_seed, hash_blocks
from core.kv_layout import KVLayout
from core.messages.to_decode import Sequence as Prompt
from core.sampling import SamplingParams, TokenLogprobs
from engine.backend import Backend, torch_backend
from engine.batch import StepBatch
from engine.block_pool import BlockPool
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.rank_links import RankLinks
from engine.runner import ModelRunner
from engine.sequence import ActiveSequence

CPU = torch.device("cpu")
BLOCK_SIZE = 16


def make_runner(
    checkpoint: Path,
    *,
    links: RankLinks | None = None,
    layout: KVLayout | None = None,
    num_blocks: int = 4096,
    dtype: str | None = None,
    num_threads: int = 1,
    make_backend: Callable[[KVLayout], Backend] = torch_backend,
) -> ModelRunner:
    """Of a lone rank, unless told otherwise."""
    spec = load_model_spec(checkpoint, dtype)
    layout = layout or spec.kv_layout(1, BLOCK_SIZE)
    reader = CheckpointReader(checkpoint, spec, CPU)
    backend = make_backend(layout)
    return ModelRunner(spec, reader.read, layout, num_blocks, links or RankLinks(), CPU, num_threads, backend=backend)


@dataclass
class _Running:
    sequence: ActiveSequence
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def take(self, num_tokens: int, token: int | None, logprobs: TokenLogprobs | None) -> bool:
        """True when the sequence is finished."""
        self.sequence.advance(num_tokens)
        if token is None:
            return False
        self.output.append(token)
        self.logprobs.append(logprobs)
        return self.sequence.append(token) is not None


class PlainEngine:
    """First come, first served, up to `max_num_seqs` at once; every prompt's blocks stay cached."""

    def __init__(self, runner: ModelRunner, max_num_seqs: int = 16, max_num_batched_tokens: int = 512) -> None:
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_cached_tokens = 0  # found in the prefix cache, over all prompts
        self.num_steps = 0
        self.most_held = 0  # blocks, after any step

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[_Running]:
        waiting = list(zip(prompts, sampling, strict=True))
        started: list[_Running] = []
        running: list[_Running] = []
        while waiting or running:
            while waiting and len(running) < self.max_num_seqs:
                running.append(self._start(*waiting.pop(0)))
                started.append(running[-1])
            running = self._step(running)
        self.pool.validate()
        assert self.pool.num_held == self.pool.num_promised == 0
        return started

    def _start(self, prompt: Sequence[int], sampling: SamplingParams) -> _Running:
        hashes = hash_blocks(prompt, BLOCK_SIZE)
        sequence = ActiveSequence(self.pool, self.runner.layout, Prompt(tuple(prompt), hashes, sampling, chain_seed()))
        sequence.acquire_prefix()
        sequence.reserve(self.max_num_batched_tokens)
        self.num_cached_tokens += sequence.num_cached
        return _Running(sequence)

    def _step(self, running: list[_Running]) -> list[_Running]:
        budget, batch, members = self.max_num_batched_tokens, [], []
        for one in running:
            num_tokens = min(budget, one.sequence.num_to_launch)
            if num_tokens > 0:
                one.sequence.grow(one.sequence.num_launched + num_tokens)
                batch.append(one.sequence.launch(num_tokens, len(batch)))
                members.append(one)
                budget -= num_tokens
        self.most_held = max(self.most_held, self.pool.num_held)
        result = self.runner.collect(self.runner.launch(StepBatch(tuple(batch))))
        self.num_steps += 1
        finished = []
        for one, step, token, logprobs in zip(members, batch, result.token_ids, result.logprobs, strict=True):
            if one.take(len(step.token_ids), token, logprobs):
                finished.append(one)
                one.sequence.release()
        return [one for one in running if one not in finished]


def greedy(max_tokens: int, **changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **changes)
