"""Every failure has OpenAI's shape, status and headers, and names the field at fault."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable

import httpx
import openai
import pytest

from cluster.ingress.generation import Generation, GenerationEvent
from core.errors import BatonError, InvalidParameter, NoReplica, Overloaded, PeerLost, RequestTimeout, StaleMessage
from tests.ingress.scripted import Script, Server, tokens_script

ASK = [{"role": "user", "content": "hi"}]


def failing(error: Exception, after: int = 0) -> Script:
    async def script(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        for token in range(5, 5 + after):
            yield GenerationEvent((token,))
        raise error

    return script


async def never(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
    await asyncio.Event().wait()
    yield GenerationEvent(())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", 2.5, "less than or equal to 2"),
        ("temperature", "1", "valid number"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.1, "less than or equal to 1"),
        ("top_k", -2, "greater than or equal to -1"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 17, "less than or equal to 16"),
        ("n", True, "valid integer"),
        ("max_tokens", 0, "greater than or equal to 1"),
        ("max_tokens", 1.5, "valid integer"),
        ("seed", 2**63, f"less than or equal to {2**63 - 1}"),
        ("stop", [""], "at least 1 character"),
        ("stop", ["x"] * 17, "at most 16 items"),
        ("stop", 5, "valid list"),
        ("stop_token_ids", [320], "outside 0..319"),
        ("logprobs", 21, "less than or equal to 20"),
        ("stream_options", {"include_usage": True}, "only allowed when 'stream' is true"),
        ("presence_penalty", 0.5, "'presence_penalty' is not supported"),
        ("frequency_penalty", -1, "'frequency_penalty' is not supported"),
        ("logit_bias", {"5": 1}, "'logit_bias' is not supported"),
        ("best_of", 2, "'best_of' is not supported"),
        ("suffix", "end", "'suffix' is not supported"),
        ("min_p", 0.1, "'min_p' is not supported"),
        ("tools", [{"type": "function"}], "'tools' is not supported"),
        ("response_format", {"type": "json_object"}, "'response_format' is not supported"),
        ("colour", "red", "Unrecognized request argument supplied: colour"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_limit(server: Server, field: str, value: object, message: str):
    answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", None)
    assert message in error["message"]
    assert error["param"].split(".")[0] == field
    assert server.backend.seen == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0),
        ("logit_bias", {}),
        ("best_of", 1),
        ("response_format", {"type": "text"}),
        ("tools", None),
        ("user", "me"),
        ("repetition_penalty", 1.0),
        ("temperature", None),
    ],
)
def test_a_parameter_that_asks_for_nothing_is_accepted(server: Server, field: str, value: object):
    server.answers("ok")
    answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", field: value})
    assert answer.json()["choices"][0]["text"] == "ok"


def test_echo_with_logprobs_and_alternatives_without_logprobs(server: Server):
    with pytest.raises(openai.BadRequestError, match="'echo' together with 'logprobs'"):
        server.openai.completions.create(model="tiny", prompt="x", echo=True, logprobs=1)
    with pytest.raises(openai.BadRequestError, match="'top_logprobs' is only allowed"):
        server.openai.chat.completions.create(model="tiny", messages=ASK, top_logprobs=1)


def test_too_long_names_both_lengths(server: Server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model="tiny", prompt=[5] * 500, max_tokens=20)
    assert "maximum context length is 512 tokens" in caught.value.message
    assert "520 tokens (500 in the prompt, 20 in the completion)" in caught.value.message
    assert (caught.value.code, caught.value.body["param"]) == ("context_length_exceeded", "max_tokens")


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'{"model": "tiny", "prompt": NaN}', b"\xff", b"[" * 9999])
def test_a_body_that_is_no_json_object(server: Server, body: bytes):
    answer = server.http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "field"), [("completions", "prompt"), ("chat/completions", "messages")])
def test_a_text_that_is_no_unicode(server: Server, path: str, field: str):
    content = '"\\ud800"' if field == "prompt" else '[{"role": "user", "content": "\\ud800"}]'
    answer = server.http.post(f"/v1/{path}", content=f'{{"model": "tiny", "{field}": {content}}}')
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_missing_fields_and_unknown_models(server: Server):
    answer = server.http.post("/v1/completions", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.completions.create(model="huge", prompt="x")
    assert (caught.value.code, caught.value.body["param"]) == ("model_not_found", "model")
    assert "'tiny'" in caught.value.message


def test_unknown_paths_and_methods_have_the_shape_too(server: Server):
    for answer in (server.http.get("/v1/nothing"), server.http.get("/v1/completions")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_too_large_is_refused_whether_announced_or_not(server: Server):
    large = json.dumps({"model": "tiny", "prompt": "x" * 2**18}).encode()
    announced = server.http.post("/v1/completions", content=large)
    chunked = server.http.post("/v1/completions", content=iter([large[: 2**17], large[2**17 :]]))
    for answer in (announced, chunked):
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
        assert str(2**18) in answer.json()["error"]["message"]


def test_a_body_that_does_not_come_is_given_up(make_server: Callable[..., Server]):
    server = make_server(never, body_timeout_s=0.2)
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = client.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert not server.backend.seen


CASES = [
    (Overloaded("the queue is full", retry_after_s=2.2), 429, "rate_limit_error", "rate_limit_exceeded", "3"),
    (Overloaded("the queue is full"), 429, "rate_limit_error", "rate_limit_exceeded", "1"),
    (NoReplica("no decode replica"), 503, "service_unavailable_error", None, "1"),
    (RequestTimeout("too late"), 504, "timeout_error", None, None),
    (TimeoutError(), 504, "timeout_error", None, None),
    (PeerLost("decode 3 is gone"), 503, "internal_error", None, None),
    (StaleMessage("attempt 2"), 503, "internal_error", None, None),
    (InvalidParameter("not so", field="prompt"), 400, "invalid_request_error", None, None),
    (KeyError("secret detail"), 500, "internal_error", None, None),
]


@pytest.mark.parametrize(("error", "status", "kind", "code", "retry_after"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_an_http_status(
    server: Server, error: Exception, status: int, kind: str, code: str, retry_after: str, stream: bool
):
    server.backend.script = failing(error)
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai.completions.create(model="tiny", prompt="x", stream=stream)
    assert (caught.value.status_code, caught.value.type, caught.value.code) == (status, kind, code)
    assert caught.value.response.headers.get("retry-after") == retry_after
    assert "secret" not in caught.value.message
    assert isinstance(error, BatonError) is (caught.value.body["message"] == str(error))


@pytest.mark.parametrize("n", [1, 3])
def test_a_failure_after_the_first_token_is_an_event_that_ends_the_stream(server: Server, n: int):
    server.backend.script = failing(PeerLost("decode 3 is gone"), after=2)
    failed = 'baton_requests_total{endpoint="/v1/completions",status="503"}'
    before = server.metric(failed)
    body = {"model": "tiny", "prompt": "x", "stream": True, "n": n}
    answer = server.http.post("/v1/completions", json=body)
    events = [line for line in answer.text.splitlines() if line]
    assert answer.status_code == 200 and len(events) >= 2
    assert json.loads(events[-1].removeprefix("data: "))["error"] == {
        "message": "decode 3 is gone",
        "type": "internal_error",
        "param": None,
        "code": None,
    }
    with pytest.raises(openai.APIError, match="decode 3 is gone"):
        list(server.openai.completions.create(**body))
    server.wait_until(lambda: server.metric(failed) == before + 2)


def test_a_generation_that_ends_without_a_reason_is_an_error(server: Server):
    async def script(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        yield GenerationEvent((5,))

    server.backend.script = script
    with pytest.raises(openai.InternalServerError, match="without a finish reason"):
        server.openai.completions.create(model="tiny", prompt="x")


@pytest.mark.parametrize("stream", [False, True])
def test_a_backend_that_never_answers_times_out_and_is_closed(make_server: Callable[..., Server], stream: bool):
    server = make_server(never, request_timeout_s=0.2)
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai.completions.create(model="tiny", prompt="x", stream=stream)
    assert caught.value.status_code == 504 and "0.2 s" in caught.value.message
    assert server.backend.closed.wait(5)


def test_a_stream_that_stalls_ends_with_a_timeout_event(make_server: Callable[..., Server]):
    async def stalls(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        yield GenerationEvent((5,))
        await asyncio.Event().wait()

    server = make_server(stalls, request_timeout_s=0.3)
    with pytest.raises(openai.APIError) as caught:
        list(server.openai.completions.create(model="tiny", prompt="x", stream=True))
    assert caught.value.type == "timeout_error"
    assert server.backend.closed.wait(5)
    timed_out = 'baton_requests_total{endpoint="/v1/completions",status="504"}'
    server.wait_until(lambda: server.metric(timed_out) == 1)


def test_only_the_right_key_opens_the_api(make_server: Callable[..., Server]):
    server = make_server(tokens_script([0]), api_key="s3cret-ü")
    assert server.http.get("/v1/models", headers={"Authorization": "Bearer s3cret-ü".encode()}).status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret-ü".encode()}):
        answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        server.openai.with_options(api_key="wrong").models.list()
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    assert server.backend.seen == []
