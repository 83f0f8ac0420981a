"""Why a request ran where it did: over HTTP, and as `baton why` prints it."""

from dataclasses import replace
from io import StringIO

import httpx
import pytest
from rich.console import Console

from cluster.why import fetch_why, print_why
from core.errors import InvalidParameter, RequestNotFound, Unauthorized
from core.messages.to_scheduler import Explained, ExplainedCandidate
from tests.ingress.scripted import Server, tokens_script

TAKEN = ExplainedCandidate("p1", "d0", "d1", "pair", 0.01, 0.02, 0.0, 0.1, 0.004, 0.005, 0.02)
OTHER = ExplainedCandidate("", "d0", "", "local_faster", 0.0, 0.0, 0.03, 0.2, 0.0, 0.0, 0.05)


def explained(name: str, tenant: str = "", **changes) -> Explained:
    fields = {
        "actual_first_token_s": 0.125, "actual_itl_s": 0.021, "actual_cached_tokens": 512, "actual_output_tokens": 9,
        "is_over": True, "actual_handoff_s": 0.033,
    } | changes  # fmt: skip
    return Explained(name, 0, tenant, "interactive", 700, 64, 20.0, 512, 0.25, (TAKEN, OTHER), **fields)


def test_what_was_weighed_foreseen_and_came(server: Server):
    server.backend.decisions = (explained("r-1-0"),)
    console = Console(width=80, record=True, file=StringIO())
    print_why(fetch_why(server.url, "r-1-0"), console)
    text = console.export_text()
    told = " ".join(text.split())
    assert "700 prompt tokens, 512 of them counted on as cached, 20 output tokens expected of 64" in told
    assert "waited 250.0 ms for the plan" in told
    taken, other = (line.strip() for line in text.splitlines() if "TTFT" in line)
    terms = "queue 10.0 + pull 20.0 + prefill 100.0 + transfer 4.0 + wait 5.0"
    assert taken == f"taken  pair, p1 -> d0, prefix from d1: TTFT 139.0 = {terms}; ITL 20.0"
    assert other == "or     local_faster, d0: TTFT 230.0 = restore 30.0 + prefill 200.0; ITL 50.0"
    first, handoff = "first token: 130.0 ms foreseen, 125.0 came", "29.0 ms foreseen, 33.0 came"  # 4 + 5 + a step of 20
    itl = "ITL after that: 20.0 ms foreseen, 21.0 came"
    assert f"{first}; handoff and decode's first token: {handoff}; {itl}; cached tokens found: 512" in told


def test_who_is_prefilled_where_it_decodes_has_no_handoff(server: Server):
    server.backend.decisions = (replace(explained("r", actual_handoff_s=None), candidates=(OTHER,)),)
    console = Console(width=200, record=True, file=StringIO())
    print_why(fetch_why(server.url, "r"), console)
    told = " ".join(console.export_text().split())
    assert "125.0 came; ITL after that: 50.0 ms foreseen, 21.0 came" in told and "handoff" not in told


def test_what_is_not_known_yet_is_not_made_up(server: Server):
    unknown = dict.fromkeys(("actual_first_token_s", "actual_itl_s", "actual_cached_tokens", "actual_output_tokens"))
    server.backend.decisions = (explained("r", is_over=False, **unknown),)
    console = Console(width=160, record=True, file=StringIO())
    print_why(fetch_why(server.url, "r"), console)
    text = console.export_text()
    assert "130.0 ms foreseen, - came" in text and "still under way" in text


def test_a_request_that_nobody_remembers_is_not_found(server: Server):
    with pytest.raises(RequestNotFound, match="'gone'"):
        fetch_why(server.url, "gone")


def test_an_empty_id_is_no_request(server: Server):
    with pytest.raises(InvalidParameter, match="id of a request is asked"):
        fetch_why(server.url, "")


def test_a_tenant_sees_its_own_requests_alone(make_server):
    server = make_server(tokens_script([0]), api_key="fleet", tenant_keys={"acme": "a-key", "bolt": "b-key"})
    server.backend.decisions = (explained("r", "acme"),)
    for key in ("fleet", "a-key"):
        assert len(fetch_why(server.url, "r", key)["decisions"]) == 1
    with pytest.raises(RequestNotFound):
        fetch_why(server.url, "r", "b-key")
    with pytest.raises(Unauthorized):
        fetch_why(server.url, "r", "c-key")


def test_an_id_with_strange_letters_reaches_the_route(server: Server):
    server.backend.decisions = (explained("a:b@c"),)
    assert httpx.get(f"{server.url}/v1/requests/a%3Ab%40c/why", trust_env=False).status_code == 200
