"""POST /v1/chat/completions as the openai client sees it."""

import math

import openai
import pytest

from tests.ingress.scripted import Server, tokens_script

ASK = [{"role": "user", "content": "hi"}]
JAPANESE = "吾輩は猫である。"


def streamed_text(chunks: list) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_streamed_chat_gives_role_then_text_then_reason(server: Server):
    server.answers("hello world")
    chunks = list(server.openai.chat.completions.create(model="tiny", messages=ASK, stream=True))
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert streamed_text(chunks) == "hello world"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
    assert len({c.created for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_a_whole_chat_has_message_reason_and_usage(server: Server):
    ids = server.answers("hello world")
    answer = server.openai.chat.completions.create(model="tiny", messages=ASK)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello world", "stop")
    prompt = server.backend.seen[0].prompt_token_ids
    assert server.model.tokenizer._rust.decode(prompt, skip_special_tokens=False) == "<|user|>hi<|end|><|assistant|>"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(ids) + 1  # the end token counts
    assert answer.usage.total_tokens == len(prompt) + len(ids) + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize("tokens_per_event", [1, 2, 5])
def test_characters_that_span_tokens_and_events_stream_whole(server: Server, tokens_per_event: int):
    server.answers(JAPANESE, tokens_per_event)
    chunks = list(server.openai.chat.completions.create(model="tiny", messages=ASK, stream=True))
    assert streamed_text(chunks) == JAPANESE
    assert not any("\ufffd" in (c.choices[0].delta.content or "") for c in chunks)


def test_length_ends_in_the_middle_of_a_character_with_a_replacement(server: Server):
    server.answers("猫猫")
    answer = server.openai.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=4)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("猫\ufffd", "length")


def test_text_parts_names_and_earlier_answers_go_into_the_prompt(server: Server):
    server.answers("ok")
    earlier = server.openai.chat.completions.create(model="tiny", messages=ASK).choices[0].message
    messages = [
        {"role": "developer", "content": "be brief"},
        earlier,
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    server.openai.chat.completions.create(model="tiny", messages=messages)
    text = server.model.tokenizer._rust.decode(server.backend.seen[1].prompt_token_ids, skip_special_tokens=False)
    assert text == "<|system|>be brief<|end|><|assistant|>ok<|end|><|user|>one\ntwo<|end|><|assistant|>"


def test_chat_fills_the_context_unless_told_otherwise(server: Server):
    server.answers("ok")
    server.openai.chat.completions.create(model="tiny", messages=ASK)
    server.openai.chat.completions.create(model="tiny", messages=ASK, max_tokens=9)
    server.openai.chat.completions.create(model="tiny", messages=ASK, max_tokens=9, max_completion_tokens=7)
    limits = [generation.sampling.max_tokens for generation in server.backend.seen]
    assert limits == [512 - len(server.backend.seen[0].prompt_token_ids), 9, 7]


def test_usage_comes_last_in_a_stream_that_asks_for_it(server: Server):
    ids = server.answers("hello world")
    chunks = list(
        server.openai.chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ids) + 1
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
    assert all(c.usage is None and "usage" in c.model_fields_set for c in chunks[:-1])


def test_continuous_usage_counts_up(server: Server):
    ids = server.answers("hello world")
    chunks = list(
        server.openai.chat.completions.create(
            model="tiny",
            messages=ASK,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == len(ids) + 1


def test_chat_logprobs_have_bytes_and_alternatives(server: Server):
    ids = server.answers("a猫")
    answer = server.openai.chat.completions.create(model="tiny", messages=ASK, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert bytes(b for e in entries[:-1] for b in e.bytes).decode() == "a猫"
    assert entries[-1].token == "<|end|>"
    assert [e.logprob for e in entries] == [-0.5] * (len(ids) + 1)
    assert [[t.logprob for t in e.top_logprobs] for e in entries] == [[-0.5, -1.5]] * (len(ids) + 1)
    assert entries[0].top_logprobs[0].token == "a" and math.isclose(entries[0].top_logprobs[1].logprob, -1.5)
    assert server.backend.seen[0].sampling.num_logprobs == 2


def test_streamed_logprobs_equal_whole_ones(server: Server):
    server.answers("a猫")
    ask = {"model": "tiny", "messages": ASK, "logprobs": True, "top_logprobs": 1}
    whole = server.openai.chat.completions.create(**ask).choices[0].logprobs.content
    chunks = list(server.openai.chat.completions.create(**ask, stream=True))
    streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert streamed == whole


def test_logprobs_without_alternatives(server: Server):
    server.answers("a")
    answer = server.openai.chat.completions.create(model="tiny", messages=ASK, logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert server.backend.seen[0].sampling.num_logprobs == 0


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_on_request(server: Server, stream: bool):
    ids = server.answers("hello 猫")
    extra = {"return_token_ids": True}
    if stream:
        chunks = list(server.openai.chat.completions.create(model="tiny", messages=ASK, stream=True, extra_body=extra))
        prompt = chunks[0].prompt_token_ids
        output = [t for c in chunks for t in getattr(c.choices[0], "token_ids", [])]
    else:
        answer = server.openai.chat.completions.create(model="tiny", messages=ASK, extra_body=extra)
        prompt, output = answer.prompt_token_ids, answer.choices[0].token_ids
    assert prompt == list(server.backend.seen[0].prompt_token_ids)
    assert output == [*ids, 0]


def test_template_arguments_reach_the_template(server: Server):
    server.answers("ok")
    server.openai.chat.completions.create(
        model="tiny", messages=ASK, extra_body={"chat_template_kwargs": {"shout": True}}
    )
    assert "!" in server.model.tokenizer.decode(server.backend.seen[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least 1 item"),
        ([{"role": "user", "content": "refuse"}], "I refuse"),
        ([{"role": "wizard", "content": "x"}], "'system', 'developer', 'user' or 'assistant'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "text parts only, not 'image_url'"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "'messages.0.tool_calls' is not supported"),
        ([{"role": "user", "content": "x", "color": "red"}], "messages.0.color"),
        ([{"role": "user", "content": "x" * 600}], "maximum context length is 512"),
    ],
)
def test_messages_that_cannot_be_answered(server: Server, messages: list, message: str):
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(model="tiny", messages=messages)
    assert message in caught.value.message
    assert caught.value.body["param"].startswith("messages") or caught.value.code == "context_length_exceeded"
    assert server.backend.seen == []


def test_a_stop_string_ends_the_stream_and_the_generation(server: Server):
    server.answers("hello world, hello there")
    chunks = list(server.openai.chat.completions.create(model="tiny", messages=ASK, stream=True, stop=["lo th", "zzz"]))
    assert streamed_text(chunks) == "hello world, hel"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert server.backend.closed.wait(5)  # the rest was never generated
    assert len(server.backend.closed_early) == 1


def test_ignore_eos_goes_on_to_the_limit(server: Server):
    server.backend.script = tokens_script([0] * 8)
    answer = server.openai.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")
    assert server.backend.seen[0].sampling.stop_token_ids == frozenset()
