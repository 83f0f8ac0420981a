"""Published rules: each keeps to replicas with room, repeats itself, and does the arithmetic of its formula."""

import pytest

from cluster.scheduler.matches import NO_MATCHES
from cluster.scheduler.policy import Choices
from cluster.scheduler.replica_view import Growth, ReplicaView
from core.block_hash import hash_blocks
from core.errors import ConfigurationError
from core.messages.fleet import Role
from core.messages.to_scheduler import LinkStatus, Reserve
from simulator.baselines.catalog import POLICIES, find_policy
from simulator.baselines.dynamo import Dynamo
from simulator.baselines.llm_d import LlmD
from simulator.baselines.mooncake import Mooncake
from simulator.baselines.power_of_two import PowerOfTwo
from simulator.baselines.preble import Preble
from simulator.baselines.ray_prefix import RayPrefix
from simulator.baselines.round_robin import RoundRobin
from simulator.baselines.session_stick import SessionStick
from simulator.baselines.sglang_gateway import SGLangGateway
from simulator.baselines.staged import Staged
from tests.cluster.scheduler_world import BLOCK, TOKEN_BYTES, info, status
from tests.simulator.costs import small_fleet

SPEC = small_fleet(1, 1)
OTHERS = sorted(set(POLICIES) - {"baton"})


def view(name: str, role: Role = Role.DECODE, **load) -> ReplicaView:
    made = ReplicaView(info(name, role), status(**load), seen_at=0.0)
    made.usable = True
    return made


def asks(num_tokens: int, first: int = 0, **changes) -> Reserve:
    tokens = range(first, first + num_tokens)
    return Reserve(f"r{first}", 0, "i", num_tokens, 100, hash_blocks(tuple(tokens), BLOCK), 60.0, **changes)


def choices(prefills, decodes, cached=NO_MATCHES, now: float = 0.0) -> Choices:
    return Choices(prefills, decodes, cached, now, {r.info.replica_id: r for r in (*prefills, *decodes)})


@pytest.mark.parametrize("name", OTHERS)
class TestEveryRule:
    def test_only_replicas_with_room_are_chosen(self, name):
        policy = find_policy(name)(SPEC, 0)
        full = view("d0", num_free_blocks=100)
        crowded = view("d1", num_running=256)
        roomy = view("d2")
        busy = view("p0", Role.PREFILL, num_waiting_tokens=5000, num_waiting=1)
        ready = view("p1", Role.PREFILL)
        for first in range(0, 30_000, 3000):
            decision = policy.decide(asks(3000, first), choices([busy, ready], [full, crowded, roomy]))
            assert decision.decode is roomy and decision.prefill in (ready, None)
            decision = policy.decide(asks(3000, first), choices([], [full, crowded, roomy]))
            assert decision.decode is roomy and decision.prefill is None

    def test_it_has_requests_wait_when_nobody_has_room(self, name):
        policy = find_policy(name)(SPEC, 0)
        busy = view("p0", Role.PREFILL, num_waiting_tokens=5000, num_waiting=1)
        assert policy.decide(asks(3000), choices([busy], [view("d0")])) is None
        assert policy.decide(asks(3000), choices([view("p1", Role.PREFILL)], [view("d0", num_running=256)])) is None
        assert policy.decide(asks(3000), choices([], [view("d0", num_running=256)])) is None

    def test_who_failed_a_request_is_avoided(self, name):
        policy = find_policy(name)(SPEC, 0)
        prefills, decodes = [view(f"p{i}", Role.PREFILL) for i in range(3)], [view(f"d{i}") for i in range(3)]
        for first in range(0, 30_000, 3000):
            request = asks(3000, first, avoid=("p0", "p2", "d1", "d2"))
            decision = policy.decide(request, choices(prefills, decodes))
            assert (decision.prefill.info.replica_id, decision.decode.info.replica_id) == ("p1", "d0")

    def test_the_same_seed_repeats_its_choices(self, name):
        def names(order: int) -> list[tuple[str, str]]:
            policy, found = find_policy(name)(SPEC, 5), []
            prefills, decodes = [view(f"p{i}", Role.PREFILL) for i in range(4)], [view(f"d{i}") for i in range(4)]
            for first in range(0, 60_000, 3000):
                decision = policy.decide(asks(3000, first), choices(prefills[::order], decodes[::order], now=first))
                found.append((decision.prefill.info.replica_id, decision.decode.info.replica_id))
            return found

        assert names(1) == names(1) == names(-1)


def decoded_by(policy, request: Reserve, decodes, cached=NO_MATCHES, now: float = 0.0) -> str:
    """In a fleet without prefill replicas."""
    return policy.decide(request, choices([], decodes, cached, now)).decode.info.replica_id


def alone(rule) -> Staged:
    return Staged(rule, rule, 0.95)


class Cached(dict):
    """Leading blocks by replica id: as much of Matches as rules use."""

    def depth(self, replica_id: str) -> int:
        return self.get(replica_id, 0)


def test_round_robin_takes_turns():
    policy, decodes = alone(RoundRobin()), [view(f"d{i}") for i in range(3)]
    assert [decoded_by(policy, asks(10), decodes) for _ in range(5)] == ["d0", "d1", "d2", "d0", "d1"]
    assert decoded_by(policy, asks(10), decodes[:2]) == "d0"  # d2, whose turn it was, is gone


def test_power_of_two_takes_the_less_loaded_of_two():
    policy = alone(PowerOfTwo(seed=1))
    decodes = [view("d0", num_running=9), view("d1", num_running=5), view("d2", num_running=1)]
    found = [decoded_by(policy, asks(10), decodes) for _ in range(300)]
    assert found.count("d0") == 0  # it loses against each of the others
    assert found.count("d1") == pytest.approx(100, abs=25)  # one pair of three


def test_a_conversation_stays_where_it_was():
    policy, decodes = alone(SessionStick()), [view("d0", num_running=3), view("d1", num_running=1)]
    assert decoded_by(policy, asks(64), decodes) == "d1"
    decodes[1].status = status(num_running=50)
    assert decoded_by(policy, asks(96), decodes) == "d1"  # begins with what was the whole prompt
    assert decoded_by(policy, asks(96, first=1000), decodes) == "d0"


def test_dynamo_weighs_uncached_prompt_against_blocks_in_use():
    policy = Dynamo(0.95)
    request = asks(3200)
    idle = view("d0", num_free_blocks=40_000 - 150)
    knows = view("d1", num_free_blocks=40_000 - 100, num_waiting_tokens=800, num_waiting=1)
    cached = Cached(d1=100)  # 1600 tokens
    assert policy.cost(request, idle, cached, 1.0) == 3200 / 16 + 150 + 200
    assert policy.cost(request, knows, cached, 1.0) == (800 + 3200 - 1600) / 16 + 100 + 200
    assert policy.cost(request, knows, cached, 0.0) == (800 + 3200) / 16 + 100 + 200
    assert decoded_by(policy, request, [idle, knows], cached) == "d1"


@pytest.mark.parametrize(
    ("num_tokens", "num_cached_blocks", "reason"), [(3200, 100, "local_short"), (3200, 50, "pair"), (2000, 10, "pair")]
)
def test_dynamo_prefills_short_remainders_where_they_are_decoded(num_tokens, num_cached_blocks, reason):
    prefills, decodes = [view("p0", Role.PREFILL)], [view("d0")]
    decision = Dynamo(0.95).decide(asks(num_tokens), choices(prefills, decodes, Cached(d0=num_cached_blocks)))
    assert decision.reason == reason


def test_mooncake_fetches_a_prefix_when_its_own_is_too_short():
    policy = Mooncake(0.95, bytes_per_s=1e9)
    links = (LinkStatus("p1", 2e9, 1, 1),)
    near = view("p0", Role.PREFILL, prefill_tokens_per_s=1000.0, links=links)
    best = view("p1", Role.PREFILL, prefill_tokens_per_s=1000.0, num_waiting_tokens=3000, num_waiting=1)
    request, cached = asks(3200), Cached(p0=50, p1=150)
    transfer_s = 100 * BLOCK * TOKEN_BYTES / 2e9
    assert policy.ttft(request, near, best, cached) == (pytest.approx(transfer_s + 0.8), near, best)
    assert policy.ttft(request, near, best, Cached(p0=100, p1=150)) == (pytest.approx(1.6), near, None)  # 1.5 < 2
    assert policy.ttft(request, best, best, cached) == (pytest.approx(3.0 + 0.8), best, None)
    decision = policy.decide(request, choices([near, best], [view("d0")], cached))
    assert (decision.prefill, decision.lender, decision.num_uncached_tokens) == (near, best, 800)


def test_llm_d_scores():
    policy, request = LlmD(0.95), asks(4096)
    assert policy.prefix_score(request, 2048) == 0.5 * 0.25**2 + 0.5 * 0.5
    decodes = [view("d0", num_running=4, num_free_blocks=30_000), view("d1", num_running=1, num_free_blocks=40_000)]
    score = policy.scorer(request, decodes, Cached(d0=128), 0.0)
    assert score(decodes[0]) == 2 * (0.5 * 0.25**2 + 0.25) + 0.75 + 0.0
    assert score(decodes[1]) == 0.0 + 1.0 + 0.75
    stale = policy.scorer(request, decodes, Cached(), 0.3)
    assert stale(decodes[1]) == 0.0  # said nothing for 200 ms


def test_preble_exploits_explores_and_rebalances():
    policy, decodes = alone(Preble()), [view("d0"), view("d1")]
    assert decoded_by(policy, asks(1600), decodes) == "d0"  # 1600 + 100 tokens of load
    assert decoded_by(policy, asks(1600, first=5000), decodes) == "d1"
    assert decoded_by(policy, asks(3200), decodes, Cached(d0=101)) == "d0"  # 1616 cached, 1584 new
    assert decoded_by(policy, asks(3200), decodes, Cached(d0=100)) == "d1"  # as many new as cached: d0 has 3384
    assert decoded_by(policy, asks(8000), decodes, Cached(d0=500), now=1.0) == "d0"
    assert decoded_by(policy, asks(8000), decodes, Cached(d1=300), now=2.0) == "d1"  # 5000 within 1.5 times 3485
    assert decoded_by(policy, asks(8000), decodes, Cached(d1=500), now=3.0) == "d0"  # 8300 beyond 1.5 times 3485
    assert decoded_by(policy, asks(8000), decodes, Cached(d1=500), now=200.0) == "d1"  # three minutes later


def test_one_hot_worker_turns_the_gateways_cache_routing_off():
    policy = alone(SGLangGateway())
    decodes = [view("d0", num_running=64), view("d1", num_running=0), view("d2", num_running=1)]
    assert decoded_by(policy, asks(1600), decodes, Cached(d2=90)) == "d2"
    decodes[0].status = status(num_running=65)
    assert decoded_by(policy, asks(1600), decodes, Cached(d2=90)) == "d1"


def test_the_gateway_sends_strangers_to_the_smallest_tree():
    policy, decodes = alone(SGLangGateway()), [view("d0"), view("d1")]
    found = [decoded_by(policy, asks(size, first), decodes) for size, first in ((100, 0), (400, 500), (200, 1000))]
    assert found == ["d0", "d1", "d0"]
    assert decoded_by(policy, asks(1600), decodes, Cached(d1=30)) == "d0"  # 30 % is not above 30 %
    assert decoded_by(policy, asks(1600), decodes, Cached(d1=31)) == "d1"


def test_rays_router_matches_prefixes_while_queues_are_even():
    policy, decodes = alone(RayPrefix(seed=0)), [view("d0", num_running=10), view("d1", num_running=0)]
    assert decoded_by(policy, asks(1600), decodes, Cached(d0=10)) == "d0"  # 10 % match
    assert decoded_by(policy, asks(1600), decodes, Cached(d0=9)) == "d1"  # the smaller tree
    decodes[0].status = status(num_running=11)
    assert decoded_by(policy, asks(1600), decodes, Cached(d0=100)) == "d1"  # the shorter queue of two


def test_a_decision_reserves_what_is_missing():
    prefill, decode = view("p0", Role.PREFILL), view("d0")
    decision = find_policy("least-outstanding")(SPEC, 0).decide(
        asks(1600), choices([prefill], [decode], Cached(p0=40, d0=25))
    )
    assert (decision.num_uncached_tokens, decision.num_cached_tokens) == (960, 640)
    assert (decision.num_decode_blocks, decision.num_transfer_bytes) == (75, 75 * BLOCK * TOKEN_BYTES)


def test_reservations_count_before_reports_do():
    decodes = [view("d0"), view("d1")]
    decodes[0].reserve_decode("x", 10, Growth(100, 10.0))
    assert decoded_by(find_policy("least-outstanding")(SPEC, 0), asks(10), decodes) == "d1"


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigurationError, match="'best' is none of baton, round-robin"):
        find_policy("best")


def test_a_fleet_with_sparse_reports_is_not_taken_for_saturated():
    policy = find_policy("llm-d")(small_fleet(1, 1, report__quiet_interval_s=5.0), 0)
    decodes = [view("d0", num_running=9), view("d1")]
    assert decoded_by(policy, asks(10), decodes, now=9.0) == "d1"
