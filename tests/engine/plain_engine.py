"""Generates with a BlockPool and a ModelRunner alone: the least that must work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core.block_hash import chain_seed, hash_blocks
from core.kv_layout import KVLayout
from core.sampling import SamplingParams, TokenLogprobs
from engine.backend import Backend, torch_backend
from engine.batch import Draw, SequenceStep, StepBatch
from engine.block_pool import BlockPool
from engine.checkpoint import load_model_spec
from engine.checkpoint_reader import CheckpointReader
from engine.rank_group import RankGroup, SingleRank
from engine.runner import ModelRunner

CPU = torch.device("cpu")
BLOCK_SIZE = 16


def make_runner(
    checkpoint: Path,
    *,
    group: RankGroup | None = None,
    num_blocks: int = 4096,
    dtype: str | None = None,
    num_threads: int = 1,
    make_backend: Callable[[KVLayout], Backend] = torch_backend,
) -> ModelRunner:
    group = group or SingleRank()
    spec = load_model_spec(checkpoint, dtype)
    layout = spec.kv_layout(group.size, BLOCK_SIZE)
    reader = CheckpointReader(checkpoint, spec, CPU)
    backend = make_backend(layout)
    return ModelRunner(spec, reader.read, layout, num_blocks, group, CPU, num_threads, backend=backend)


@dataclass
class _Running:
    tokens: list[int]
    sampling: SamplingParams
    blocks: list[int]
    num_computed: int
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def step(self, budget: int) -> SequenceStep:
        share = tuple(self.tokens[self.num_computed : self.num_computed + budget])
        last = self.num_computed + len(share) == len(self.tokens)
        s = self.sampling
        draw = Draw(s.temperature, s.top_p, s.top_k, s.seed, s.num_logprobs) if last else None
        return SequenceStep(share, self.num_computed, tuple(self.blocks), draw)

    def take(self, step: SequenceStep, token: int | None, logprobs: TokenLogprobs | None) -> bool:
        """True when the sequence is finished."""
        self.num_computed += len(step.token_ids)
        if token is None:
            return False
        self.tokens.append(token)
        self.output.append(token)
        self.logprobs.append(logprobs)
        return len(self.output) == self.sampling.max_tokens or token in self.sampling.stop_token_ids


class PlainEngine:
    """First come, first served, up to `max_num_seqs` at once; every prompt's blocks stay cached."""

    def __init__(self, runner: ModelRunner, max_num_seqs: int = 16, max_num_batched_tokens: int = 512) -> None:
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_cached_tokens = 0  # found in the prefix cache, over all prompts
        self.num_steps = 0

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
        assert self.pool.num_held == 0
        return started

    def _start(self, prompt: Sequence[int], sampling: SamplingParams) -> _Running:
        hashes = hash_blocks(prompt, BLOCK_SIZE)[: (len(prompt) - 1) // BLOCK_SIZE]
        cached = self.pool.acquire_cached(hashes)
        num_blocks = -(-(len(prompt) + sampling.max_tokens) // BLOCK_SIZE)
        blocks = cached + self.pool.allocate(num_blocks - len(cached))
        self.num_cached_tokens += len(cached) * BLOCK_SIZE
        return _Running(list(prompt), sampling, blocks, len(cached) * BLOCK_SIZE)

    def _step(self, running: list[_Running]) -> list[_Running]:
        budget, batch, members = self.max_num_batched_tokens, [], []
        for sequence in running:
            if budget > 0:
                batch.append(sequence.step(budget))
                members.append(sequence)
                budget -= len(batch[-1].token_ids)
        result = self.runner.collect(self.runner.launch(StepBatch(tuple(batch))))
        self.num_steps += 1
        finished = []
        for sequence, step, token, logprobs in zip(members, batch, result.token_ids, result.logprobs, strict=True):
            if sequence.take(step, token, logprobs):
                finished.append(sequence)
        for sequence in finished:
            self._release(sequence)
        return [sequence for sequence in running if sequence not in finished]

    def _release(self, sequence: _Running) -> None:
        parent = chain_seed()
        written = sequence.tokens[: sequence.num_computed]
        for block, block_hash in zip(sequence.blocks, hash_blocks(written, BLOCK_SIZE), strict=False):
            self.pool.register(block, block_hash, parent)
            parent = block_hash
        self.pool.disown(sequence.blocks)


def greedy(max_tokens: int, **changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **changes)
