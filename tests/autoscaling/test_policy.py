"""Policies by name, one of your own as the documentation shows it, and the rules of the default one in numbers."""

import doctest
from dataclasses import replace

import pytest

from cluster.autoscaling import policy as policy_module
from cluster.autoscaling.itl_model import ItlModel
from cluster.autoscaling.policy import FixedPolicy, make_policy
from cluster.autoscaling.signals import Demand, FleetSignals, PoolSignals, Workload
from cluster.autoscaling.slo import SloPolicy
from core.autoscaling_config import AutoscalingConfig
from core.errors import ConfigurationError
from tests.autoscaling.closed_loop import NOON

PREFILL = PoolSignals(2, 2, 0, 0, 0, 1000.0, 0, 16, 0.0, 0.0)
DECODE = PoolSignals(2, 2, 0, 0, 0, 0.0, 0, 16, 0.0, 0.0)
NO_WORKLOAD = Workload(0, 0, 0)
CONFIG = AutoscalingConfig(policy="slo", replica_start_s=0, ttft_target_s=2, itl_target_s=0.05, decode_batch_share=0.5)


def demand_of(workload: Workload = NO_WORKLOAD, prefill=None, decode=None, config=CONFIG) -> Demand:
    signals = FleetSignals(0.0, NOON, replace(PREFILL, **(prefill or {})), replace(DECODE, **(decode or {})), workload)
    return SloPolicy(config).demand(signals)


def numbers(demand: Demand) -> tuple[float, float]:
    return round(demand.prefill.num_replicas, 6), round(demand.decode.num_replicas, 6)


def test_built_in_policies_have_names():
    assert isinstance(make_policy(AutoscalingConfig()), FixedPolicy)
    assert isinstance(make_policy(CONFIG), SloPolicy)


@pytest.mark.parametrize(
    ("name", "named"),
    [("slow", "neither one of fixed, slo"), ("no_such_module:Policy", "cannot be imported"), (":Policy", "imported"),
     ("json:Policy", "no class"), ("json:JSONDecoder", "method `demand`"), ("json:loads", "no class")],
)  # fmt: skip
def test_a_wrong_name_is_refused_and_the_field_named(name, named):
    with pytest.raises(ConfigurationError, match=named) as refusal:
        make_policy(AutoscalingConfig(policy=name))
    assert refusal.value.field == "autoscaling.policy"
    assert refusal.value.message.startswith("autoscaling.policy: ")


def test_the_policy_of_the_documentation_works_by_its_name(tmp_path, monkeypatch):
    """Its lines, as they stand in the docstring, become the file that the page tells to write."""
    (example,) = doctest.DocTestFinder(recurse=False).find(policy_module, "policy")
    (tmp_path / "policies_of_mine.py").write_text("".join(step.source for step in example.examples))
    monkeypatch.syspath_prepend(tmp_path)
    options = {"requests_per_prefill": 4}
    own = make_policy(AutoscalingConfig(policy="policies_of_mine:PerRequest", policy_options=options))
    signals = FleetSignals(
        0.0, NOON, replace(PREFILL, num_waiting=10), replace(DECODE, num_running=20), Workload(0, 0, 0)
    )
    assert numbers(own.demand(signals)) == (2.5, 2.5)
    assert own.demand(signals).prefill.reason == "10 requests wait"


def test_without_requests_nothing_is_needed():
    assert numbers(demand_of()) == (0, 0)


def test_steady_traffic_needs_its_share_of_rate_and_slots():
    """7 requests/s of 300 tokens at 700 tokens/s; each 1.7 + 0.3 s in one of 8 slots."""
    assert numbers(demand_of(Workload(7.0, 300.0, 1.7))) == (3.0, 1.75)


def test_a_backlog_is_worked_off_within_what_the_own_prefill_leaves_of_the_target():
    """1 s of work a second, 0.5 s of own prefill, so 7500 tokens in 1.5 s: five more."""
    backlog = {"queued_prompt_tokens": 4500, "outstanding_prompt_tokens": 3000}
    assert numbers(demand_of(Workload(2.0, 500.0, 0.5), prefill=backlog))[0] == 6.0


def test_with_a_long_start_a_backlog_is_spread_over_it_and_a_missed_target_asks_for_one_more():
    slow = CONFIG.model_copy(update={"replica_start_s": 60.0})
    asked = demand_of(Workload(2.0, 500.0, 0.5), prefill={"queued_prompt_tokens": 7500}, config=slow)
    assert asked.prefill.num_replicas == 3
    assert asked.prefill.reason == "predicted TTFT 4.25 s above 2 s"


def test_batch_cache_and_step_time_each_ask_for_decode():
    assert numbers(demand_of(decode={"num_running": 20}))[1] == 2.5
    assert numbers(demand_of(decode={"num_running": 8, "kv_usage": 0.9}))[1] == 2.4
    assert numbers(demand_of(decode={"num_running": 8, "itl_s": 0.1}))[1] == 4.0
    assert numbers(demand_of(decode={"num_running": 8, "num_waiting": 8, "itl_s": 0.05}))[1] == 4.0


def test_more_replicas_than_requests_are_never_asked_for():
    assert numbers(demand_of(decode={"num_running": 1, "itl_s": 9.0, "kv_usage": 1.0}))[1] == 1.0


def test_who_waits_for_decode_counts_as_far_as_answers_overlap():
    waiting = {"num_running": 8, "num_waiting": 40}
    assert numbers(demand_of(decode=waiting))[1] == 6.0, "how long answers take is unknown: room for all"
    slow = CONFIG.model_copy(update={"replica_start_s": 10.0})
    assert numbers(demand_of(Workload(0, 0, 2.0), decode=waiting, config=slow))[1] == 2.0, "2 of 10 s: every fifth"


def test_a_pool_without_replicas_asks_for_one_as_soon_as_anybody_waits():
    nobody = {"num_ready": 0, "num_target": 0, "prefill_tokens_per_s": 0.0, "max_num_seqs": 0}
    waiting = {"num_waiting": 1, "queued_prompt_tokens": 100}
    assert numbers(demand_of(prefill=nobody | waiting, decode=nobody | waiting)) == (1, 1)
    assert numbers(demand_of(Workload(0.1, 100.0, 0.0), prefill=nobody, decode=nobody)) == (1, 1)


def test_step_times_teach_the_batch_that_fits():
    model = ItlModel()
    for batch in (2, 4, 8, 4, 2, 16):
        model.add(batch, 0.02 + 0.001 * batch)
    assert model.batch_within(0.03) == pytest.approx(10.0)
    assert model.batch_within(0.01) == 1.0, "no batch fits; one request at a time is the most that replicas can do"


def test_one_batch_size_alone_teaches_nothing():
    model = ItlModel()
    assert model.batch_within(0.03) is None
    for _ in range(10):
        model.add(8, 0.02)
    assert model.batch_within(0.03) is None
