"""Models, health, request ids and metrics: what operators look at."""

import asyncio
import threading
import uuid

import httpx
import openai
import pytest

from cluster.ingress.app import build_app
from cluster.ingress.generation import FleetHealth
from cluster.ingress.served_model import ServedModel
from core.config import IngressConfig
from core.messages.to_scheduler import FleetStatus
from core.telemetry import request_id_var
from tests.ingress.scripted import ScriptedBackend, Server, tokens_script


def test_models_lists_the_one_served(server: Server):
    listed = server.openai.models.list().data
    assert [(m.id, m.object, m.owned_by, m.max_model_len) for m in listed] == [("tiny", "model", "baton", 512)]
    assert server.openai.models.retrieve("tiny").created == listed[0].created == server.model.created
    answer = server.http.get("/v1/models/some/other")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("health", "status", "word"),
    [
        (FleetHealth(True), 200, "ok"),
        (FleetHealth(True, "no prefill replica"), 200, "degraded"),
        (FleetHealth(False, "no decode replica"), 503, "unavailable"),
    ],
)
def test_readiness_follows_the_fleet_and_says_what_is_missing(
    server: Server, health: FleetHealth, status: int, word: str
):
    server.backend.health_now = health
    for path in ("/readyz", "/health"):
        answer = server.http.get(path)
        assert (answer.status_code, answer.json()) == (status, {"status": word, "degraded": health.degraded})
    assert server.http.get("/livez").status_code == 200


def test_the_context_is_no_longer_than_the_kv_caches_of_the_fleet(server: Server):
    server.backend.health_now = FleetHealth(True, max_model_len=96)
    assert server.openai.models.list().data[0].max_model_len == 96
    server.backend.script = tokens_script([5] * 96)
    chat = server.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert chat.usage.total_tokens == 96 and chat.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 96 tokens"):
        server.openai.completions.create(model="tiny", prompt=[5] * 90, max_tokens=7)


def test_a_given_request_id_comes_back_and_names_the_generation(server: Server):
    server.answers("ok")
    body = {"model": "tiny", "prompt": "x", "n": 2}
    given = "req-" + uuid.uuid4().hex
    for _ in range(2):  # a retry with the same id is still another generation
        answer = server.http.post("/v1/completions", json=body, headers={"X-Request-Id": given})
        assert answer.headers["x-request-id"] == given
        assert answer.json()["id"].startswith(f"cmpl-{given}-")
    names = [generation.request_id for generation in server.backend.seen]
    assert len(set(names)) == 4 and all(name.startswith(f"{given}-") for name in names)
    assert sorted(name[-2:] for name in names) == ["-0", "-0", "-1", "-1"]


async def test_a_cluster_that_is_slow_to_list_its_nodes_stops_no_other_request(model: ServedModel):
    asked, answered = threading.Event(), threading.Event()

    def nodes() -> list[dict[str, object]]:
        asked.set()
        assert answered.wait(5)
        return [{"address": "10.0.0.1"}]

    backend = ScriptedBackend(tokens_script([0]), fleet_now=FleetStatus("s", (), 0, 0))
    transport = httpx.ASGITransport(build_app(IngressConfig(), model, backend, nodes), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
        fleet = asyncio.create_task(client.get("/fleet"))
        while not asked.is_set():
            await asyncio.sleep(0.001)
        assert (await client.get("/livez")).status_code == 200
        answered.set()
        assert (await fleet).json()["nodes"] == [{"address": "10.0.0.1"}]


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "{}"])
def test_an_unsafe_or_missing_request_id_is_replaced(server: Server, given: str):
    answer = server.http.get("/livez", headers={"X-Request-Id": given})
    made = answer.headers["x-request-id"]
    assert made != given and len(made) == 24 and made.isalnum()


def test_the_request_id_is_in_the_context_of_every_choice(server: Server):
    seen: list[str] = []
    script = tokens_script([0])

    def remember(generation):
        seen.append(request_id_var.get())
        return script(generation)

    server.backend.script = remember
    server.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "n": 2}, headers={"X-Request-Id": "abc"})
    assert seen == ["abc", "abc"]
    assert request_id_var.get() == "-"


def test_metrics_move_by_what_happened(server: Server):
    names = [
        "baton_time_to_first_token_seconds_count",
        "baton_inter_token_seconds_count",
        "baton_prompt_tokens_total",
        "baton_cached_prompt_tokens_total",
        "baton_output_tokens_total",
        "baton_resumes_total",
        "baton_transfer_bytes_total",
        'baton_requests_total{endpoint="/v1/completions",status="200"}',
        'baton_requests_total{endpoint="/v1/completions",status="400"}',
        'baton_request_seconds_count{endpoint="/v1/completions"}',
        'baton_phase_seconds_sum{phase="queue"}',
        'baton_phase_seconds_sum{phase="prefill"}',
        'baton_phase_seconds_sum{phase="transfer"}',
        'baton_phase_seconds_sum{phase="exposed_transfer"}',
        'baton_phase_seconds_sum{phase="first_decode"}',
    ]
    before = [server.metric(name) for name in names]
    server.backend.script = tokens_script([5] * 16)
    for stream in (False, True):
        list(server.openai.completions.create(model="tiny", prompt=[5, 6, 7, 8], max_tokens=6, stream=stream))
    server.openai.completions.create(model="tiny", prompt=[5, 6, 7, 8], max_tokens=6, n=2)
    server.http.post("/v1/completions", json={"model": "tiny", "prompt": ""})
    moved = [server.metric(name) - start for name, start in zip(names, before, strict=True)]
    # three requests, four choices of 4 prompt and 6 output tokens each, one refused request
    assert moved == [3, 20, 16, 12, 24, 4, 16384, 3, 1, 4, 1.0, 2.0, 0.5, 0.25, 0.125]
