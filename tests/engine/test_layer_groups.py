"""The layers of a step in groups: all of them, in order, the last one as small as asked for."""

import pytest

from engine.layer_groups import layer_groups


@pytest.mark.parametrize(
    ("arguments", "groups"),
    [
        ((12, 4), (4, 4, 4)),
        ((10, 4), (4, 4, 2)),
        ((3, 8), (3,)),
        ((12, 4, 1), (4, 4, 2, 1, 1)),
        ((12, 4, 2), (4, 4, 2, 2)),
        ((12, 4, 4), (4, 4, 4)),
        ((7, 7, 1), (4, 2, 1)),
        ((9, 4, 1), (4, 4, 1)),
    ],
)
def test_groups_are_even_and_the_final_one_is_halved_down(arguments, groups):
    assert layer_groups(*arguments) == groups


def test_every_layer_is_in_one_group():
    for num_layers in range(1, 40):
        for largest in range(1, 12):
            for last in (None, 1, 2, 5):
                groups = layer_groups(num_layers, largest, last)
                assert sum(groups) == num_layers
                assert 1 <= min(groups) <= max(groups) <= largest
                assert last is None or groups[-1] <= last
