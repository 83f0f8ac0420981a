"""FlashInfer is planned and called so that it computes what TorchAttention does, as far as arguments can show it."""

import importlib
import inspect
import random

import pytest
import torch
from torch import Tensor

from core.kv_groups import KVGroup
from engine.attention import TorchAttention
from engine.attention_math import AttentionRule
from engine.batch import BlockTable, SequenceStep, StepBatch
from engine.flashinfer_attention import FlashInferAttention
from engine.flashinfer_latents import FlashInferLatentAttention
from engine.latent_attention import LatentAttention
from engine.latent_up import LatentUp
from engine.step_inputs import StepInputs, lay_out
from tests.engine import plain_flashinfer

CPU = torch.device("cpu")
BLOCK_SIZE, HEAD_DIM, NUM_BLOCKS = 4, 8, 96
DECODE = [(1, 0), (1, 3), (1, 4), (1, 17), (1, 30)]  # (tokens, first position)
MIXED = [(1, 5), (6, 0), (1, 30), (9, 11), (3, 4), (1, 0)]


def steps_of(sizes: list[tuple[int, int]], seed: int = 0) -> StepInputs:
    """Sequences whose blocks lie scattered over the cache."""
    blocks = list(range(NUM_BLOCKS))
    random.Random(seed).shuffle(blocks)
    sequences = []
    for num_tokens, first in sizes:
        num_blocks = -(-(first + num_tokens) // BLOCK_SIZE)
        tables = tuple(BlockTable(tuple(blocks.pop() for _ in range(num_blocks))) for _ in range(2))
        sequences.append(SequenceStep((1,) * num_tokens, first, tables, None))
    return lay_out(StepBatch(tuple(sequences)), CPU)


def together(window: int | None) -> tuple[KVGroup, ...]:
    """Both layers in one group."""
    return (KVGroup((0, 1), window),)


def apart(*windows: int | None) -> tuple[KVGroup, ...]:
    """Each layer in a group of its own."""
    return tuple(KVGroup((layer,), window) for layer, window in enumerate(windows))


def random_rows(inputs: StepInputs, num_query_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one product, as the decoder makes them."""
    generator = torch.Generator().manual_seed(3)
    heads = torch.randn(len(inputs.token_ids), num_query_heads + 2 * num_kv_heads, HEAD_DIM, generator=generator)
    query, key, value = heads.split((num_query_heads, num_kv_heads, num_kv_heads), dim=1)
    return query, key, value


def random_cache(num_kv_heads: int) -> Tensor:
    return torch.randn(2, NUM_BLOCKS, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM, generator=torch.Generator().manual_seed(1))


RULES = {
    "plain": AttentionRule(0.3),
    "window": AttentionRule(0.3, window=7),
    "narrow window": AttentionRule(0.3, window=1),
    "soft cap": AttentionRule(0.9, softcap=1.5),
    "window and soft cap": AttentionRule(0.9, window=9, softcap=1.5),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("sizes", [DECODE, MIXED, [(13, 0)], [(5, 6), (2, 2)]], ids=str)
def test_results_and_cache_are_those_of_torch(sizes, heads, rule):
    inputs = steps_of(sizes)
    rows = random_rows(inputs, *heads)
    theirs, ours = random_cache(heads[1]), random_cache(heads[1])
    expected = TorchAttention(theirs, together(rule.window)).plan(inputs).attend(1, *rows, rule)
    found = FlashInferAttention(plain_flashinfer, ours, together(rule.window)).plan(inputs).attend(1, *rows, rule)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("window", [None, 6])
def test_sinks(window: int | None):
    inputs = steps_of(MIXED)
    rule = AttentionRule(0.3, window=window, sinks=torch.randn(6, generator=torch.Generator().manual_seed(2)))
    rows = random_rows(inputs, 6, 2)
    groups = together(window)
    expected = TorchAttention(random_cache(2), groups).plan(inputs).attend(0, *rows, rule)
    found = FlashInferAttention(plain_flashinfer, random_cache(2), groups).plan(inputs).attend(0, *rows, rule)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_of_several_kinds_share_a_step():
    inputs, cache, groups = steps_of(MIXED), random_cache(2), apart(7, None)
    rows, step = random_rows(inputs, 6, 2), FlashInferAttention(plain_flashinfer, cache, groups).plan(inputs)
    for layer, name in enumerate(("window", "plain")):
        expected = TorchAttention(random_cache(2), groups).plan(inputs).attend(layer, *rows, RULES[name])
        torch.testing.assert_close(step.attend(layer, *rows, RULES[name]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sinks", [None, torch.randn(6)], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("window", [None, 7])
def test_steps_of_fixed_size_read_what_they_are_renewed_with(window, sinks):
    rules = [AttentionRule(0.3, window, sinks=sinks), AttentionRule(0.3, None, sinks=sinks)]
    cache, groups = random_cache(2), apart(window, None)
    fixed = FlashInferAttention(plain_flashinfer, cache, groups).fixed(len(DECODE), -(-40 // BLOCK_SIZE))
    for shift in (0, 1, 6):
        cache.copy_(random_cache(2))
        inputs = steps_of([(1, first + shift) for _, first in DECODE], seed=shift)
        rows = random_rows(inputs, 6, 2)
        fixed.renew(inputs)
        for layer, rule in enumerate(rules):
            expected = TorchAttention(random_cache(2), groups).plan(inputs).attend(layer, *rows, rule)
            torch.testing.assert_close(fixed.attend(layer, *rows, rule), expected, rtol=1e-4, atol=1e-5)


HEADS, LATENT, ROTATED, PLAIN = 3, 8, 4, 6
UP = LatentUp(torch.randn(HEADS, PLAIN + 5, LATENT, generator=torch.Generator().manual_seed(4)), PLAIN)


def latent_cache() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, NUM_BLOCKS, 1, 1, BLOCK_SIZE, LATENT + ROTATED, generator=generator)


def latent_rows(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(len(inputs.token_ids), HEADS, PLAIN + ROTATED, generator=generator)
    latent = torch.randn(len(inputs.token_ids), 1, LATENT + ROTATED, generator=generator)
    return query, latent, latent[..., :LATENT]


@pytest.mark.parametrize("sizes", [DECODE, MIXED, [(13, 0)], [(5, 6), (2, 2)]], ids=str)
def test_latents(sizes):
    inputs, theirs, ours = steps_of(sizes), latent_cache(), latent_cache()
    rows, rule = latent_rows(inputs), AttentionRule(0.4, up=UP)
    expected = LatentAttention(theirs, together(None)).plan(inputs).attend(1, *rows, rule)
    step = FlashInferLatentAttention(plain_flashinfer, ours, together(None)).plan(inputs)
    torch.testing.assert_close(step.attend(1, *rows, rule), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours, theirs)


def test_latents_of_fixed_size():
    rule, cache = AttentionRule(0.4, up=UP), latent_cache()
    fixed = FlashInferLatentAttention(plain_flashinfer, cache, together(None)).fixed(len(DECODE), -(-40 // BLOCK_SIZE))
    for shift in (0, 1, 6):
        cache.copy_(latent_cache())
        inputs = steps_of([(1, first + shift) for _, first in DECODE], seed=shift)
        rows = latent_rows(inputs)
        fixed.renew(inputs)
        for layer in (0, 1):
            expected = LatentAttention(latent_cache(), together(None)).plan(inputs).attend(layer, *rows, rule)
            torch.testing.assert_close(fixed.attend(layer, *rows, rule), expected, rtol=1e-4, atol=1e-5)


def test_the_record_is_true_of_the_installed_library():
    library = pytest.importorskip("flashinfer")
    recorded = plain_flashinfer.SIGNATURES.get(library.__version__)
    if recorded is None:
        pytest.skip(f"flashinfer {library.__version__} is not recorded")
    for name, signature in recorded.items():
        owner, _, method = name.partition(".")
        found = getattr(importlib.import_module("flashinfer"), owner)
        found = inspect.signature(getattr(found, f"_{method}_impl", getattr(found, method)) if method else found)
        assert list(found.parameters) == list(signature.parameters), name
