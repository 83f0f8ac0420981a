"""Who asks, and what a request expects: from headers and body to what the scheduler is told."""

import openai
import pytest

from cluster.ingress.generation import Standing
from cluster.ingress.orchestrator import Fleet
from tests.ingress.scripted import Server, tokens_script


def test_a_request_without_a_word_is_standard_and_nobodys(server: Server):
    server.answers("ok")
    server.openai.completions.create(model="tiny", prompt=[5])
    assert server.backend.seen[0].standing == Standing()


@pytest.mark.parametrize(
    ("tier", "slo_class"),
    [("auto", "standard"), ("default", "standard"), ("flex", "batch"), ("priority", "interactive")],
)
def test_openais_tiers_are_classes(server: Server, tier: str, slo_class: str):
    server.answers("ok")
    server.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], service_tier=tier
    )
    assert server.backend.seen[0].standing.slo_class == slo_class


def test_targets_and_priority_of_one_request(server: Server):
    server.answers("ok")
    options = {"slo_class": "interactive", "slo": {"ttft_ms": 250, "itl_ms": 40.5}, "priority": -3}
    server.openai.completions.create(model="tiny", prompt=[5], extra_body={"baton": options, "service_tier": "flex"})
    assert server.backend.seen[0].standing == Standing("", "interactive", 0.25, 0.0405, -3)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"slo_class": "gold"}, "baton.slo_class"),
        ({"slo": {"ttft_ms": 0}}, "baton.slo.ttft_ms"),
        ({"slo": {"tpot_ms": 5}}, "baton.slo.tpot_ms"),
        ({"priority": 101}, "baton.priority"),
        ({"priority": "high"}, "baton.priority"),
    ],
)
def test_what_is_no_target_is_refused_by_name(server: Server, options: dict, field: str):
    with pytest.raises(openai.BadRequestError) as refusal:
        server.openai.completions.create(model="tiny", prompt=[5], extra_body={"baton": options})
    assert refusal.value.param == field


def test_an_unknown_tier_is_refused(server: Server):
    with pytest.raises(openai.BadRequestError) as refusal:
        server.openai.completions.create(model="tiny", prompt=[5], extra_body={"service_tier": "gold"})
    assert refusal.value.param == "service_tier"


def test_a_tenant_is_known_by_its_key(make_server):
    server = make_server(tokens_script([0]), api_key="fleet", tenant_keys={"acme": "a-key", "bolt": "b-key"})
    for key, tenant in (("a-key", "acme"), ("b-key", "bolt"), ("fleet", "")):
        server.openai.with_options(api_key=key).completions.create(model="tiny", prompt=[5])
        assert server.backend.seen[-1].standing.tenant == tenant
    with pytest.raises(openai.AuthenticationError):
        server.openai.with_options(api_key="c-key").completions.create(model="tiny", prompt=[5])


def test_with_tenants_alone_nobody_else_is_let_in(make_server):
    server = make_server(tokens_script([0]), tenant_keys={"acme": "a-key"})
    server.openai.with_options(api_key="a-key").models.list()
    with pytest.raises(openai.AuthenticationError):
        server.openai.with_options(api_key="none").models.list()


def test_tenants_find_nothing_of_each_others_prefixes_unless_they_shall():
    apart, together = Fleet("i", 16, "salt", 3), Fleet("i", 16, "salt", 3, tenants_share_prefixes=True)
    assert len({apart.salt(tenant) for tenant in ("", "a", "b")}) == 3
    assert apart.salt("") == "salt"
    assert {together.salt(tenant) for tenant in ("", "a", "b")} == {"salt"}
