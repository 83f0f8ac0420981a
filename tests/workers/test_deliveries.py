"""Which prompts a prefill replica takes, and how long it keeps what it owes to decode."""

import pytest

from core.block_hash import chain_seed
from core.errors import PromptTooLong
from core.kv_groups import KVGroup
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_decode import Commit, Sequence, Ticket
from core.messages.to_prefill import Prefill
from core.sampling import SamplingParams
from engine.batch import StepResult
from engine.block_pool import BlockPool
from kv_transfer.share_book import ShareBook
from prefill_worker.deliveries import Deliveries
from prefill_worker.scheduler import PrefillScheduler

TTL_S = 30.0


def deliveries_of(pool: BlockPool, layout: KVLayout, steps_in_flight: int = 1) -> tuple[Deliveries, ReplicaInfo]:
    weights = Compatibility("m", "r", "float32", 16, "h")
    info = ReplicaInfo("p0", Role.PREFILL, 1, ("p0:1",), layout, weights, pool.num_blocks, 4, 64, 128)
    scheduler = PrefillScheduler(pool, layout, 4, 64, 8, steps_in_flight)
    return Deliveries(info, pool, scheduler, ShareBook(16, TTL_S)), info


def prefill_of(num_tokens: int, decode: ReplicaInfo) -> Prefill:
    sequence = Sequence(tuple(range(num_tokens)), (), SamplingParams(4), chain_seed(""))
    return Prefill("r", 0, sequence, Ticket("r", 0, 1, decode, 0, -(-num_tokens // 16)), 600.0)


def test_a_prompt_that_waits_longer_than_decode_may_read_is_still_computed():
    layout = KVLayout(2, 2, 8, 16, "float32", 1)
    pool = BlockPool(8)
    deliveries, info = deliveries_of(pool, layout)
    deliveries.accept(prefill_of(20, info), now=0.0)

    late = 2 * TTL_S
    assert deliveries.release_expired(late) == []
    step, _ = deliveries.next_step(late)
    assert step is not None
    deliveries.layers_done(step, 0, 2, late)
    ((_, closing),) = deliveries.step_done(step, StepResult((7,), (None,)), late)
    assert isinstance(closing.message, Commit) and closing.message.num_announcements == 1

    assert deliveries.release_expired(late + TTL_S - 1) == []
    assert [share.request_id for share in deliveries.release_expired(late + TTL_S)] == ["r"]
    assert pool.num_held == 0
    deliveries.validate()


def test_a_prompt_that_steps_in_flight_leave_no_room_for_is_refused_and_does_not_wait_for_ever():
    """Of a window of 20 tokens, steps of 64 hold 7 blocks, two of them 11: nothing is behind it before they end."""
    layout = KVLayout(2, 2, 8, 16, "float32", 1, groups=(KVGroup((0, 1), 20),))
    for steps_in_flight, num_blocks in ((1, 7), (2, 11)):
        lacking, info = deliveries_of(BlockPool(num_blocks - 1), layout, steps_in_flight)
        with pytest.raises(PromptTooLong, match="the prompt has 400 tokens, this replica's KV cache holds"):
            lacking.accept(prefill_of(400, info), now=0.0)
        enough, info = deliveries_of(BlockPool(num_blocks), layout, steps_in_flight)
        enough.accept(prefill_of(400, info), now=0.0)
        assert enough.next_step(0.0)[0] is not None
