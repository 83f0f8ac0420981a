"""What came of a predicted ITL: the mean time of decode's tokens after its first, without the handoff before them."""

from dataclasses import replace

import pytest

from cluster.ingress.attempt import Attempt, Progress
from cluster.ingress.generation import Generation
from cluster.ingress.pacer import Pacer
from cluster.ingress.token_streams import Subscription
from core.config import TransferConfig
from core.messages.fleet import Role
from core.messages.to_decode import Phases, Sequence, Ticket, TokenEvent
from core.messages.to_prefill import FirstToken, Prefill
from core.messages.to_scheduler import Finish, Plan, TokenPace
from core.sampling import SamplingParams
from rpc.codec import decode, encode
from tests.ingress.test_token_streams import replica_at


def test_the_handoff_is_told_apart_from_the_pace():
    pacer = Pacer()
    assert pacer.pace() == TokenPace(None, None)
    pacer.prefilled(10.0)
    assert pacer.pace() == TokenPace(None, None)
    pacer.decoded(2, 13.0)
    assert pacer.pace() == TokenPace(3.0, None)
    pacer.decoded(3, 13.25)
    pacer.decoded(6, 14.0)  # three at once
    pacer.decoded(5, 99.0)  # sent again after a break
    assert pacer.pace() == TokenPace(3.0, 0.25)


def test_decode_alone_has_a_pace_and_no_handoff_and_one_token_no_pace():
    alone = Pacer()
    alone.decoded(41, 5.0)  # of a second attempt: 40 tokens came from the first one
    assert alone.pace() == TokenPace(None, None)
    alone.decoded(45, 7.0)
    assert alone.pace() == TokenPace(None, 0.5)


def test_a_handoff_that_was_over_before_prefills_answer_came_took_nothing():
    pacer = Pacer()
    pacer.decoded(2, 4.0)
    pacer.prefilled(4.5)
    assert pacer.pace() == TokenPace(0.0, None)


class Prefills:
    """An RPC client whose one call returns a first token, 2 s after it was asked."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    async def call(self, *_: object) -> FirstToken:
        self._clock[0] += 2.0
        return FirstToken(7, None, None, 0, 0.0, 2.0)


@pytest.mark.parametrize(("finish_reason", "num_output_tokens"), [("length", 15), (None, None)])
async def test_an_attempt_tells_its_own_pace_however_it_ends(finish_reason, num_output_tokens):
    """10 tokens came from an attempt before; prefill's follows, the handoff takes 3 s, then a token comes each 20 ms.

    By the time from prefill's token to the end over all tokens the ITL would be 0.22 s.
    """
    clock = [100.0]
    params = SamplingParams(15, temperature=0.0)
    progress = Progress(Generation("r", (1, 2), params, 60.0, "auto"), float("inf"), list(range(10)))
    subscription = Subscription("r", 1, 64, clock=lambda: clock[0])
    progress.pacer = subscription.pacer
    replica = replica_at("d0:1")
    plan = Plan("r", 1, replace(replica, replica_id="p0", role=Role.PREFILL), replica, 0.0, 0.0, "pair")
    attempt = Attempt(progress, plan, subscription, Prefills(clock), TransferConfig(), lambda _: None)
    sequence = Sequence((1, 2), (), params, b"", 10)
    events = attempt.events(Prefill("r", 1, sequence, Ticket("r", 1, "l", replica, 0, 1, (0,)), 60.0))
    progress.shown += (await anext(events)).token_ids
    clock[0] += 3.0
    for index in range(11, 15):
        phases, reason = (Phases(), None) if index == 11 else (None, finish_reason if index == 14 else None)
        subscription.deliver(TokenEvent("r", 1, index, (index,), finish_reason=reason, phases=phases))
        clock[0] += 0.02
    clock[0] += 50.0  # the client reads late
    for _ in range(4):
        progress.shown += (await anext(events)).token_ids
    await events.aclose()
    finish = progress.finish(1)
    assert (finish.attempt, finish.num_output_tokens) == (1, num_output_tokens)
    assert (finish.pace.handoff_s, finish.pace.itl_s) == pytest.approx((3.0, 0.02))
    assert decode(Finish, encode(finish)) == finish
