"""Dynamo's request trace: calls by when they came, prompts by their blocks, outputs by what was found cached."""

import json

import pytest

from core.errors import ConfigurationError
from simulator.traces.readers import read_trace
from simulator.traces.trace import expand

BLOCK = 16
START_MS = 1_779_163_048_815


def line(name: str, at_s: float, hashes: list[int], num_in: int, num_out: int, cached: int | None, session="root"):
    """As Dynamo writes a call that has ended: the event's own time is that of its end."""
    request = {
        "request_id": name, "model": "m", "input_tokens": num_in, "output_tokens": num_out, "cached_tokens": cached,
        "request_received_ms": START_MS + round(at_s * 1000), "ttft_ms": 20.5, "total_time_ms": 9000.25,
        "replay": {"trace_block_size": BLOCK, "input_length": num_in, "input_sequence_hashes": hashes},
    }  # fmt: skip
    event = {"schema": "dynamo.request.trace.v1", "event_type": "request_end", "agent_context": {"session_id": session}}
    return {"timestamp": 7, "event": event | {"event_source": "dynamo", "request": request}}


TOOL = {
    "timestamp": 8,
    "event": {
        "schema": "dynamo.request.trace.v1",
        "event_type": "tool_end",
        "agent_context": {"session_id": "root"},
        "tool": {"tool_call_id": "c", "tool_class": "ls", "duration_ms": 4.07},
    },
}
BIG = 2**64 - 5  # hashes have 64 bits


def read(tmp_path, *lines):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return {request.request_id: request for request in read_trace(path)}


def test_calls_are_read_by_when_they_came_and_tools_left_out(tmp_path):
    late = line("late", 61.5, [BIG, 2, 3], 40, 3, 0)
    early = line("early", 0.0, [BIG, 2, 9], 48, 0, 32, session="root:scout")
    found = read(tmp_path, late, TOOL, early)
    assert [(r.request_id, r.arrival_s, r.session) for r in found.values()] == [
        ("early", 0.0, "root:scout"),
        ("late", 61.5, "root"),
    ]
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in found.values()] == [(48, 1), (40, 3)]
    early_tokens, late_tokens = (expand(request.prompt) for request in found.values())
    assert early_tokens[:32] == late_tokens[:32] and not set(early_tokens[32:]) & set(late_tokens[32:])


@pytest.mark.parametrize(
    ("cached", "num_said"),
    [
        (None, 60),  # nobody knows: the next prompt is taken to repeat all that was said
        (96, 60),  # all of it was found: 36 tokens of the prompt and 60 of the output
        (80, 44),  # so far the next prompt was as the one before and its answer
        (32, 0),  # the history has nothing of what was said
        (16, 60),  # a cache that lost part of the first prompt says nothing of its answer
    ],
)
def test_an_answer_is_in_the_next_prompt_as_far_as_it_was_found_cached(tmp_path, cached, num_said):
    first = line("first", 0, [1, 2, 3], 36, 60, 0)  # the third block is partial, and is another one once it is full
    second = line("second", 9, [1, 2, 30, 4, 5, 6, 7], 112, 5, cached)
    found = read(tmp_path, first, second)
    before, after = found["first"], expand(found["second"].prompt)
    said = expand(before.output)
    assert expand(before.prompt) == after[:36]
    assert len(said) == 60 and said[:num_said] == after[36 : 36 + num_said]
    assert not set(said[num_said:]) & set(after)


def test_a_prompt_that_begins_otherwise_does_not_continue_a_session(tmp_path):
    found = read(tmp_path, line("first", 0, [1, 2, 3], 48, 20, 0), line("second", 9, [1, 8, 9, 10, 11], 80, 5, 16))
    assert not set(expand(found["first"].output)) & set(expand(found["second"].prompt))
    assert expand(found["first"].prompt)[:16] == expand(found["second"].prompt)[:16]


def test_a_call_without_blocks_has_its_lengths_alone(tmp_path):
    lines = [line(name, 0, [], 100, 7, 0) for name in ("a", "b")]
    for one in lines:
        del one["event"]["request"]["replay"]
    found = read(tmp_path, *lines)
    assert [request.num_prompt_tokens for request in found.values()] == [100, 100]
    assert not set(expand(found["a"].prompt)) & set(expand(found["b"].prompt))


def changed(**changes):
    one = line("x", 0, [1], 10, 5, 0)
    one["event"]["request"] |= changes
    return one


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (changed(input_tokens=0), r"line 2: event\.request\.input_tokens: .* greater than or equal to 1"),
        (changed(request_received_ms=None), r"line 2: event\.request\.request_received_ms: .* valid number"),
        (changed(replay={"trace_block_size": 0, "input_length": 1, "input_sequence_hashes": []}), "trace_block_size"),
        (changed(request_received_ms=START_MS + 1e13), r"x arrives at 1e\+10 s"),
        ({"event": {}}, r"line 2: event\.event_type: Field required"),
    ],
)
def test_a_line_that_cannot_be_is_named(tmp_path, bad, problem):
    with pytest.raises(ConfigurationError, match=f"is not of kind 'dynamo': ValueError .*{problem}") as raised:
        read(tmp_path, line("good", 0, [1], 10, 5, 0), bad)
    assert "\n" not in raised.value.message


def test_calls_of_one_id_are_refused_by_it(tmp_path):
    with pytest.raises(ConfigurationError, match=r"trace .*trace\.jsonl has request id 'same' twice"):
        read(tmp_path, line("same", 0, [1], 10, 5, 0), line("same", 1, [2], 10, 5, 0))


@pytest.mark.parametrize("hashes", [[1], [1, 2, 3, 4]])
def test_hashes_that_do_not_agree_with_the_length_are_refused_by_name(tmp_path, hashes):
    with pytest.raises(ConfigurationError, match=f"call odd: {len(hashes)} input_sequence_hashes for 40 tokens"):
        read(tmp_path, line("odd", 0, hashes, 40, 3, 0))


def test_the_partial_block_may_have_a_hash_or_none(tmp_path):
    found = read(tmp_path, line("with", 0, [1, 2, 3], 40, 3, 0), line("without", 1, [1, 2], 40, 3, 0))
    with_it, without = (expand(request.prompt) for request in found.values())
    assert len(with_it) == len(without) == 40 and with_it[:32] == without[:32]
