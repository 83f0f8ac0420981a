"""Handoffs between two replicas' books in every interleaving: searched by rules, at random, and told as stories."""

import pytest
from hypothesis import HealthCheck, settings

from core import compiled
from core.messages.to_decode import Commit
from tests.handoff.handoff_model import HandoffModel, WindowedHandoffModel
from tests.handoff.random_handoffs import COMMON, run_random

CHANGES_A_POOL = pytest.mark.skipif(compiled.found_build() is not None, reason="compiled objects take no method")

TestHandoffModel = HandoffModel.TestCase
TestHandoffModel.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)

TestWindowedHandoffModel = WindowedHandoffModel.TestCase
TestWindowedHandoffModel.settings = TestHandoffModel.settings

MODELS = pytest.mark.parametrize("model_class", [HandoffModel, WindowedHandoffModel])


class First:
    """Stands in for hypothesis' data: the first of a list."""

    def draw(self, _):
        return 0


@MODELS
def test_the_plain_path_ends_with_the_right_tokens(model_class):
    model = model_class()
    model.request("a", [1, 0, 1, 1, 0], 4, False)
    for _ in range(40):
        while model.wire:
            model.receive(model.wire.pop(0))
        while model.fetches:
            fetch = model.fetches.pop(0)
            model.fetches.append(fetch)
            model.end_fetch(First(), False)
        model.prefill_forward()
        handoff = next(iter(model.handoffs), None)
        if handoff is not None and handoff.job is not None:
            last = handoff.sequence
        model.decode_forward()
    assert model.joined == 1
    assert last.token_ids == [1, 0, 1, 1, 0, 1, 0, 0, 0]
    model.teardown()


def test_a_prefix_that_is_on_its_way_is_sent_once():
    model = HandoffModel()
    model.request("a", COMMON[:5], 4, False)
    model.request("b", COMMON[:7], 4, False)
    tickets = [message.ticket for message in model.wire]
    assert [(t.first_missing_block, t.num_blocks) for t in tickets] == [(0, 3), (2, 4)]
    for _ in range(30):
        while model.wire:
            model.receive(model.wire.pop(0))
        while model.fetches:
            model.end_fetch(First(), False)
        model.prefill_forward()
    assert model.joined == 2 and model.shared == 2
    model.teardown()


@pytest.mark.parametrize("is_evicted", [False, pytest.param(True, marks=CHANGES_A_POOL)])
def test_who_waits_for_a_prefix_that_never_comes_takes_it_from_its_source(is_evicted):
    model = HandoffModel()
    model.request("a", COMMON[:5], 4, False)
    model.request("b", COMMON[:7], 4, False)
    model.cancel("a", True)
    assert model.orphaned == 0, "prefill has not computed it yet"
    while not model.orphaned:
        commits = [message for message in model.wire if isinstance(message, Commit)]
        if commits and is_evicted:
            model.prefill_pool.match = lambda keys: []
        while model.wire:
            model.receive(model.wire.pop(0))
        while model.fetches:
            model.end_fetch(First(), False)
        model.prefill_forward()
    assert (model.joined, len(model.handoffs)) == ((0, 0) if is_evicted else (1, 1))
    model.teardown()


@MODELS
def test_long_random_lives_end_with_nothing_held(model_class):
    joined = shared = orphaned = 0
    for seed in range(20):
        model = run_random(seed, 1500, model_class)
        joined, shared, orphaned = joined + model.joined, shared + model.shared, orphaned + model.orphaned
        model.teardown()
    print(f"{joined} requests joined decode, {shared} blocks came with another's transfer, {orphaned} waited in vain")
    assert joined > 300 and shared > 10 and orphaned > 1
