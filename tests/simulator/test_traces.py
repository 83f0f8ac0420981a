"""Traces as they are read and scaled: arrivals, lengths, and which prefixes requests share."""

import gzip
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigurationError
from simulator.traces.readers import read_trace
from simulator.traces.scaling import halves, scale
from simulator.traces.trace import Run, TracedRequest, blocks, expand, runs_of_blocks, split_at


def write(path, text):
    with gzip.open(path, "wt") as file:
        file.write(text)
    return path


def test_runs_stand_for_tokens():
    assert blocks([7, 8, 9, 4, 5], 4) == (Run(7, 4, 3), Run(4, 4, 2))
    assert expand(runs_of_blocks(blocks([7, 8, 9], 4), 10, own=99)) == (7, 7, 7, 7, 8, 8, 8, 8, 9, 9)
    assert expand(runs_of_blocks(blocks([7, 8], 4), 10, own=99)) == (7, 7, 7, 7, 8, 8, 8, 8, 99, 99)


@given(
    st.lists(st.builds(Run, st.integers(0, 50), st.integers(1, 9), st.integers(1, 6)), max_size=6),
    st.integers(0, 200),
)
def test_runs_are_cut_where_their_tokens_are(runs, num_tokens):
    head, tail = split_at(runs, num_tokens)
    assert expand(head) == expand(runs)[:num_tokens]
    assert expand(tail) == expand(runs)[num_tokens:]


def test_ticking_timestamps_are_spread_and_prefixes_kept(tmp_path):
    rows = [
        {
            "timestamp": 3000 * (i // 10),
            "input_length": 2000 + i,
            "output_length": 5,
            "hash_ids": [0, i % 20, 50 + i, 90],
        }
        for i in range(60)
    ]
    path = write(tmp_path / "trace.jsonl.gz", "\n".join(map(json.dumps, rows)))
    trace = read_trace(path, seed=3)
    assert len(trace) == 60
    assert len({request.arrival_s for request in trace}) == 60
    assert all(0 <= request.arrival_s < 18 for request in trace)
    assert [request.arrival_s for request in trace] == sorted(request.arrival_s for request in trace)
    first, other = (next(r for r in trace if r.request_id == f"blocks-{i}") for i in (1, 21))
    assert expand(first.prompt)[:1024] == expand(other.prompt)[:1024]  # ids 0 and 1, of 512 tokens each
    assert expand(first.prompt)[1024] != expand(other.prompt)[1024]
    assert first.num_prompt_tokens == 2001
    assert read_trace(path, seed=3) == trace != read_trace(path, seed=4)


def test_azure_and_servegen_have_lengths_alone(tmp_path):
    azure = write(
        tmp_path / "a.csv.gz",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.4799600,31,0\n",
    )
    first, second = read_trace(azure)
    assert (first.arrival_s, first.num_prompt_tokens, first.num_output_tokens) == (0.0, 4808, 10)
    assert (second.arrival_s, second.num_prompt_tokens, second.num_output_tokens) == (1.5, 31, 1)
    assert not set(expand(first.prompt)) & set(expand(second.prompt))
    servegen = tmp_path / "s.csv"
    servegen.write_text("t_s,client,input_tokens,output_tokens,reason_ratio\n0.5,35,226,255,0.6\n")
    (only,) = read_trace(servegen)
    assert (only.tenant, only.arrival_s, only.num_prompt_tokens) == ("35", 0.5, 226)


def session(name, **changes):
    requests = [
        {"t": 0.0, "in": 300, "out": 40, "hash_runs": [[1, 4]]},
        {"t": 5000.0, "in": 400, "out": 10, "hash_runs": [[1, 6]]},
        {
            "t": 5001.0,
            "agent_id": "sub",
            "tool_tokens": 64,
            "system_tokens": 0,
            "requests": [{"t": 2.0, "in": 130, "out": 3, "hash_runs": [[100, 2]]}],
        },
    ]
    return (
        {"id": name, "block_size": 64, "hash_id_scope": "local", "tool_tokens": 100, "system_tokens": 30}
        | {"requests": requests}
        | changes
    )


def test_an_agents_next_prompt_begins_with_what_the_model_said(tmp_path):
    path = write(tmp_path / "s.jsonl.gz", "\n".join(json.dumps(session(name)) for name in ("a", "b")))
    trace = {request.request_id: request for request in read_trace(path)}
    first, second = trace["a-main-0"], trace["a-main-1"]
    said = expand(first.prompt) + expand(first.output)
    assert expand(second.prompt)[: len(said)] == said
    assert second.arrival_s - first.arrival_s == 600.0  # a pause of 5000 s is cut
    assert trace["a-sub-0"].arrival_s == pytest.approx(first.arrival_s + 603.0)
    shared = expand(trace["b-main-0"].prompt)
    assert shared[:128] == expand(first.prompt)[:128]  # two blocks of tools and system prompt
    assert shared[128] != expand(first.prompt)[128]


def test_scaling_draws_independent_sessions(tmp_path):
    path = write(tmp_path / "s.jsonl.gz", "\n".join(json.dumps(session(f"{i}")) for i in range(40)))
    trace = read_trace(path)
    scaled = scale(trace, 3.0, seed=1)
    assert len(scaled) == pytest.approx(3 * len(trace), rel=0.25)
    assert scaled == scale(trace, 3.0, seed=1)
    assert len({request.request_id for request in scaled}) == len(scaled)
    by_session: dict[str, list[TracedRequest]] = {}
    for request in scaled:
        by_session.setdefault(request.session, []).append(request)
    prompts = [expand(requests[0].prompt) for name, requests in by_session.items() if "main" in name]
    assert len({prompt[:128] for prompt in prompts}) == 1
    assert len({prompt[128:192] for prompt in prompts}) == len(prompts)
    assert len({requests[0].arrival_s for requests in by_session.values()}) == len(by_session)
    for requests in by_session.values():
        for earlier, later in pairwise(requests):
            said = expand(earlier.prompt) + expand(earlier.output)
            assert expand(later.prompt)[: len(said)] == said
    first, second = halves(scaled)
    assert len(first) + len(second) == len(scaled)
    assert second[0].arrival_s >= 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hello\n", "begins like none"),
        ("", "begins like none"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("TIMESTAMP,ContextTokens\nx,y\n", "not of kind 'azure'"),
        ('{"hash_ids": [1], "timestamp": 0}\n', "not of kind 'blocks'"),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path, text, problem):
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=problem):
        read_trace(path)
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_trace(tmp_path / "missing")
