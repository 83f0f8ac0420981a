"""One grouped product, and expert by expert: the same mixture, on one rank or shared out."""

from functools import partial

import pytest
import torch

from engine.experts import Experts
from engine.grouped_experts import GroupedExperts
from engine.kernels import TorchKernels
from engine.linear import Linear
from engine.mlp import Mlp

NUM_EXPERTS, HIDDEN, INNER, TOP_K = 6, 32, 16, 2


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("own", [range(6), range(2, 4), range(5, 6)])
def test_a_grouped_product_is_that_of_each_expert_alone(num_rows, has_bias, own):
    generator = torch.Generator().manual_seed(num_rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gate_up, down = random(NUM_EXPERTS, 2 * INNER, HIDDEN), random(NUM_EXPERTS, HIDDEN, INNER)
    gate_up_bias = random(NUM_EXPERTS, 2 * INNER) if has_bias else None
    down_bias = random(NUM_EXPERTS, HIDDEN) if has_bias else None
    x, weights = random(num_rows, HIDDEN), random(num_rows, TOP_K).abs()
    chosen = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(num_rows)])
    part = slice(own.start, own.stop)
    activate = partial(TorchKernels().activate, activation="silu")
    grouped = GroupedExperts(
        own.start,
        gate_up[part],
        None if gate_up_bias is None else gate_up_bias[part],
        down[part],
        None if down_bias is None else down_bias[part],
        activate,
    )(x, chosen, weights)

    expected = torch.zeros(num_rows, HIDDEN)
    for row in range(num_rows):
        for expert, weight in zip(chosen[row].tolist(), weights[row], strict=True):
            if expert in own:
                inner = gate_up[expert] @ x[row] + (0 if gate_up_bias is None else gate_up_bias[expert])
                output = down[expert] @ activate(inner) + (0 if down_bias is None else down_bias[expert])
                expected[row] += weight * output
    one_by_one = [
        Mlp(
            Linear(gate_up[e].clone(), None if gate_up_bias is None else gate_up_bias[e]),
            Linear(down[e].clone(), None if down_bias is None else down_bias[e]),
            activate,
        )
        for e in own
    ]
    alone = Experts(own.start, one_by_one)(x, chosen, weights)
    torch.testing.assert_close(grouped, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-3)
