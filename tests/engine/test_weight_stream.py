"""Layers in host memory: the same tokens, no more memory on the device than allowed, copies in the right order."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.errors import ConfigurationError
from core.weight_budget import num_resident_layers
from engine.backend import Backend, torch_backend
from engine.layer_images import HostImage
from engine.weight_stream import PlainCopier, WeightStream
from tests.checkpoints import make_checkpoint
from tests.engine.plain_engine import CPU, PlainEngine, greedy, make_runner
from tests.engine.replays import plain_flashinfer_backend

KIB = 1 << 10


@pytest.mark.parametrize(
    ("budget", "resident"),
    [(None, 5), (60, 5), (59, 2), (50, 2), (49, 1), (40, 1), (39, 0), (30, 0)],
)
def test_layers_stay_as_long_as_two_slots_fit_beside_them(budget: int | None, resident: int):
    """Others 10; layers 10 each: n that stay and two slots take 10 + 10 n + 20."""
    assert num_resident_layers([10] * 5, 10, budget) == resident


def test_slots_are_as_large_as_the_largest_layer_that_streams():
    assert num_resident_layers([30, 10, 10, 10], 0, 50) == 1
    assert num_resident_layers([10, 30, 10, 10, 10], 10, 70) == 2


def test_what_cannot_fit_is_refused():
    message = "engine.device_weights_mib 2 is below 3, what embedding, head and the layers on their way take"
    with pytest.raises(ConfigurationError, match=message) as refused:
        num_resident_layers([1 << 20] * 4, 1 << 20, (3 << 20) - 1)
    assert refused.value.field == "engine.device_weights_mib"


class NotedCopier(PlainCopier):
    """Copies late, as a device may, and checks that no slot is overwritten before it is released."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        self.free = {0, 1}
        self.copied: list[float] = []

    def copy(self, slot: int, to: Tensor, source: Tensor) -> None:
        assert slot in self.free, "the slot is still read"
        self.free.remove(slot)
        self.pending[slot] = (to, source)

    def arrive(self, slot: int) -> None:
        if slot in self.pending:
            to, source = self.pending.pop(slot)
            to.copy_(source)
            self.copied.append(float(source[0]))

    def release(self, slot: int) -> None:
        self.free.add(slot)


@pytest.mark.parametrize("num_layers", [2, 3, 4, 5])
def test_every_layer_is_there_in_its_turn_round_after_round(num_layers: int):
    images = [HostImage([torch.full((3,), float(number))], CPU) for number in range(num_layers)]
    copier = NotedCopier()
    stream = WeightStream(images, CPU, copier)
    for _ in range(3):
        assert [float(stream.on_device(number)[0][2]) for number in stream.in_turn()] == list(range(num_layers))
        assert len(copier.pending) == 2, "the next round's first two layers are on their way"
    assert stream.device_bytes == 2 * 256


def test_a_round_that_is_broken_off_does_no_harm():
    images = [HostImage([torch.full((3,), float(number))], CPU) for number in range(5)]
    stream = WeightStream(images, CPU, PlainCopier())
    for number in stream.in_turn():
        if number == 3:
            break
    assert [float(stream.on_device(number)[0][0]) for number in stream.in_turn()] == list(range(5))


def outputs(runner) -> list[list[int]]:
    rng = random.Random(2)
    prompts = [[rng.randrange(8, 384) for _ in range(length)] for length in (3, 40, 17)]
    engine = PlainEngine(runner, max_num_batched_tokens=24)
    return [sequence.output for sequence in engine.generate(prompts, [greedy(6)] * 3)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("by", ["torch", "flashinfer"])
def test_tokens_and_what_others_may_borrow_are_the_same(tmp_path: Path, family: str, by: str):
    checkpoint = make_checkpoint(tmp_path, family, num_hidden_layers=5, **_layers_of(family, 5))
    plain = make_runner(checkpoint, num_blocks=64)
    expected, parameters = outputs(plain), [stored().clone() for stored in plain.weights.parameters]
    total = sum(parameter.nbytes for parameter in parameters)
    plain.close()

    def make(layout) -> Backend:
        kept = plain_flashinfer_backend()(layout) if by == "flashinfer" else torch_backend(layout, may_compile=False)
        return Backend(kept.kernels, kept.attention, device_weight_bytes=total - KIB)

    runner = make_runner(checkpoint, num_blocks=64, make_backend=make)
    stream = runner.weights.stream
    assert stream is not None and 3 <= stream.num_layers <= 5
    for _ in range(2):
        assert outputs(runner) == expected
        for stored, parameter in zip(runner.weights.parameters, parameters, strict=True):
            assert torch.equal(stored(), parameter)
    runner.close()


def _layers_of(family: str, count: int) -> dict[str, object]:
    """Settings that are given layer by layer."""
    kinds = ["sliding_attention", "full_attention"] * count
    return {"layer_types": kinds[:count]} if family in ("gpt_oss", "gemma2") else {}


def test_no_more_than_the_budget_is_on_the_device(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path, "llama", num_hidden_layers=6)
    plain = make_runner(checkpoint, num_blocks=8)
    sizes = [stored().nbytes for stored in plain.weights.parameters]
    plain.close()
    per_layer, others = sum(sizes[:-3]) // 6, sum(sizes[-3:])
    budget = others + 4 * per_layer + 2 * KIB  # two stay, two slots
    runner = make_runner(
        checkpoint, num_blocks=8, make_backend=lambda layout: Backend(*_plain(layout), device_weight_bytes=budget)
    )
    stream = runner.weights.stream
    assert stream is not None and stream.num_layers == 4
    assert others + 2 * per_layer + stream.device_bytes <= budget + 4 * KIB  # what images round up
    on_host = {image.memory.untyped_storage().data_ptr() for image in stream._images}
    lent = [stored().untyped_storage().data_ptr() in on_host for stored in runner.weights.parameters[:-3]]
    assert lent == [False] * (len(lent) // 3) + [True] * (2 * len(lent) // 3), "two layers of six stay"
    runner.close()


def _plain(layout) -> tuple:
    backend = torch_backend(layout, may_compile=False)
    return backend.kernels, backend.attention
