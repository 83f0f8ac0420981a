"""How long a prefill replica keeps what it owes to decode."""

from core.block_hash import chain_seed
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


def test_a_prompt_that_waits_longer_than_decode_may_read_is_still_computed():
    layout = KVLayout(2, 2, 8, 16, "float32", 1)
    weights = Compatibility("m", "r", "float32", 16, "h")
    info = ReplicaInfo("p0", Role.PREFILL, 1, ("p0:1",), layout, weights, 8, 4, 64, 128)
    pool = BlockPool(8)
    deliveries = Deliveries(info, pool, PrefillScheduler(pool, layout, 4, 64, 8), ShareBook(16, TTL_S))
    sequence = Sequence(tuple(range(20)), (), SamplingParams(4), chain_seed(""))
    deliveries.accept(Prefill("r", 0, sequence, Ticket("r", 0, 1, info, 0, 2), 600.0), now=0.0)

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
