"""POST /v1/completions as the openai client sees it."""

import asyncio
from collections.abc import AsyncGenerator

import openai
import pytest

from cluster.ingress.choices import choice_seed
from cluster.ingress.generation import Generation, GenerationEvent
from core.sampling import SamplingParams
from tests.ingress.scripted import Server, tokens_script


def test_a_text_prompt(server: Server):
    ids = server.answers("hello world", end=False)
    answer = server.openai.completions.create(model="tiny", prompt="the quick", max_tokens=len(ids))
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello world", "length")
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert list(server.backend.seen[0].prompt_token_ids) == server.model.tokenizer.encode(["the quick"], True)[0]
    assert answer.usage.completion_tokens == len(ids)


def test_the_default_is_sixteen_tokens_or_what_fits(server: Server):
    server.backend.script = tokens_script([5] * 16)
    server.openai.completions.create(model="tiny", prompt=[5])
    server.openai.completions.create(model="tiny", prompt=[5] * 505)
    assert [generation.sampling.max_tokens for generation in server.backend.seen] == [16, 7]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([5, 6], [(5, 6)]), ([[5, 6], [7]], [(5, 6), (7,)]), (["a", "b"], None)],
)
def test_prompts_of_every_form(server: Server, prompt: list, expected: list | None):
    server.answers("ok")
    answer = server.openai.completions.create(model="tiny", prompt=prompt, stream=False)
    expected = expected or [tuple(ids) for ids in server.model.tokenizer.encode(prompt, True)]
    asked = sorted(server.backend.seen, key=lambda generation: generation.request_id)
    assert [generation.prompt_token_ids for generation in asked] == expected
    assert [(choice.index, choice.text) for choice in answer.choices] == [(i, "ok") for i in range(len(expected))]
    assert answer.usage.prompt_tokens == sum(map(len, expected))


def test_every_sampling_parameter_reaches_the_backend(server: Server):
    server.answers("ok")
    server.openai.completions.create(
        model="tiny",
        prompt=[5],
        max_tokens=11,
        temperature=0.25,
        top_p=0.5,
        seed=77,
        logprobs=4,
        extra_body={"top_k": 40, "stop_token_ids": [9, 10]},
        user="someone",
    )
    expected = SamplingParams(11, 0.25, 0.5, 40, 77, frozenset({0, 9, 10}), 4)
    assert server.backend.seen[0].sampling == expected
    assert server.backend.seen[0].timeout_s == 600


def test_a_request_that_says_nothing_gets_the_models_defaults(server: Server):
    server.answers("ok")
    server.openai.completions.create(model="tiny", prompt=[5], extra_body={"top_k": -1, "temperature": None})
    sampling = server.backend.seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.num_logprobs) == (1.0, 1.0, 0, None)
    assert sampling.stop_token_ids == {0} and 0 <= sampling.seed < 2**63


def test_choices_have_seeds_of_their_own(server: Server):
    server.answers("ok")
    server.openai.completions.create(model="tiny", prompt=[[5], [6]], n=3, seed=77)
    server.openai.completions.create(model="tiny", prompt=[5], n=3)
    seeds = {generation.request_id: generation.sampling.seed for generation in server.backend.seen}
    in_order = [seeds[key] for key in sorted(seeds, key=lambda key: int(key.rsplit("-", 1)[1]))]
    seeded = [choice_seed(77, i) for i in range(3)]
    assert seeded[0] == 77 and len(set(seeded)) == 3
    assert len(set(seeds.values())) == 6 and set(seeded) <= set(in_order)
    assert choice_seed(-1, 0) == 2**63 - 1


def test_n_choices_run_at_once_and_interleave_in_one_stream(server: Server):
    together = asyncio.Barrier(3)  # a token of each choice before the next of any

    async def script(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        for token in (5, 6, 7):
            await together.wait()
            yield GenerationEvent((token,), finish_reason="length" if token == 7 else None)

    server.backend.script = script
    chunks = list(server.openai.completions.create(model="tiny", prompt="x", n=3, max_tokens=3, stream=True))
    order = [chunk.choices[0].index for chunk in chunks]
    assert [sorted(order[start : start + 3]) for start in (0, 3, 6)] == [[0, 1, 2]] * 3
    text = server.model.tokenizer.decode([5, 6, 7])
    for index in range(3):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == text
    assert len({generation.request_id for generation in server.backend.seen}) == 3


def test_usage_counts_a_prompt_once_however_many_choices(server: Server):
    ids = server.answers("ok")
    answer = server.openai.completions.create(model="tiny", prompt=[[5, 6, 7, 8], [9, 9, 9]], n=2)
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.completion_tokens == 4 * (len(ids) + 1)
    assert answer.usage.prompt_tokens_details.cached_tokens == 6


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_text_and_token_prompts(server: Server, stream: bool):
    server.answers("ok")
    ids = server.model.tokenizer.encode(["hello"], False)[0]
    for prompt in ("hello", ids):
        answer = server.openai.completions.create(model="tiny", prompt=prompt, echo=True, stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == "hellook"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_parallel_lists(server: Server, stream: bool):
    ids = server.answers("a猫b")
    answer = server.openai.completions.create(model="tiny", prompt="x", logprobs=2, stream=stream)
    parts = [part.choices[0].logprobs for part in (answer if stream else [answer])]
    tokens = [token for part in parts for token in part.tokens]
    assert len(tokens) == len(ids) + 1
    assert tokens[0] == "a" and tokens[1].startswith("bytes:\\x") and tokens[-2:] == ["b", "<|end|>"]
    assert [p for part in parts for p in part.token_logprobs] == [-0.5] * len(tokens)
    top = [entry for part in parts for entry in part.top_logprobs]
    assert [sorted(entry.values()) for entry in top] == [[-1.5, -0.5]] * len(tokens)
    offsets = [offset for part in parts for offset in part.text_offset]
    assert offsets[:2] == [0, 1] and offsets == sorted(offsets)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_on_request(server: Server, stream: bool):
    ids = server.answers("hello 猫")
    answer = server.openai.completions.create(
        model="tiny", prompt=[[5, 6], [7]], stream=stream, extra_body={"return_token_ids": True}
    )
    choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
    for index, prompt in ((0, [5, 6]), (1, [7])):
        mine = [choice for choice in choices if choice.index == index]
        assert mine[0].prompt_token_ids == prompt
        assert [token for choice in mine for token in choice.token_ids] == [*ids, 0]
        assert "prompt_token_ids" not in mine[-1].model_fields_set or not stream


def test_a_stop_string_cuts_text_and_tokens_but_keeps_the_token_that_completed_it(server: Server):
    ids = server.answers("hello world", tokens_per_event=50)
    answer = server.openai.completions.create(
        model="tiny", prompt="x", stop="o", logprobs=0, extra_body={"return_token_ids": True}
    )
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("hell", "stop")
    taken = choice.token_ids
    assert taken == ids[: len(taken)] and len(taken) < len(ids)
    assert "o" in server.model.tokenizer.decode(taken) and "o" not in server.model.tokenizer.decode(taken[:-1])
    assert len(choice.logprobs.tokens) == len(taken) == answer.usage.completion_tokens


def test_the_text_of_a_stop_token_is_not_shown(server: Server):
    ids = server.answers("hello world", end=False)
    answer = server.openai.completions.create(model="tiny", prompt="x", extra_body={"stop_token_ids": [ids[-1]]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == server.model.tokenizer.decode(ids[: ids.index(ids[-1])])


def test_streams_of_string_prompts_join_to_the_whole_answer(server: Server):
    server.answers("hello 猫 world", tokens_per_event=3)
    chunks = list(server.openai.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello 猫 world"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "must not be empty"),
        ([], "must be a string, a list"),
        ([[]], "must be a string, a list"),
        ([5, "a"], "must be a string, a list"),
        ([True], "must be a string, a list"),
        ([-1], "outside 0.."),
        ([99999], "outside 0..319"),
        ([[5]] * 129, "holds 129 prompts; at most 128"),
        ([5] * 512, "you requested 513 tokens (512 in the prompt, 1 in the completion)"),
    ],
)
def test_prompts_that_cannot_be_answered(server: Server, prompt: object, message: str):
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model="tiny", prompt=prompt)
    assert message in caught.value.message
    assert caught.value.body["param"] == "prompt"
    assert server.backend.seen == []
