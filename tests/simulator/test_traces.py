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
from simulator.traces.trace import Run, TracedRequest, blocks, expand, plain_request, runs_of_blocks, split_at


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


def test_ids_that_are_used_twice_are_refused_by_name(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(json.dumps(session(name)) for name in ("a", "b", "a")))
    with pytest.raises(
        ConfigurationError, match=r"s\.jsonl is not of kind 'sessions': .* session id 'a' is used twice"
    ):
        read_trace(path)
    main, _, sub = session("a")["requests"]
    path.write_text(json.dumps(session("a", requests=[main, sub, sub])))
    with pytest.raises(ConfigurationError, match="session 'a' has two agents of the id 'sub'"):
        read_trace(path)
    agent_of_a, agent_of_b = sub | {"agent_id": "b-c"}, sub | {"agent_id": "c"}
    sessions = session("a", requests=[main, agent_of_a]), session("a-b", requests=[main, agent_of_b])
    path.write_text("\n".join(map(json.dumps, sessions)))
    with pytest.raises(ConfigurationError, match=r"trace .*s\.jsonl has request id 'a-b-c-0' twice$"):
        read_trace(path)


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


def block_line(**changes) -> str:
    row = {"timestamp": 0, "input_length": 40, "output_length": 5, "hash_ids": [0, 1, 2, 3]}
    return json.dumps(row | changes) + "\n"


AZURE, SERVEGEN = "TIMESTAMP,ContextTokens,GeneratedTokens\n", "t_s,client,input_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (block_line(input_length=0), "line 2: input_length: .* greater than or equal to 1"),
        (block_line(output_length=-3), "line 2: output_length: .* greater than or equal to 1"),
        (block_line(input_length=40.5), "line 2: input_length: .* valid integer"),
        (block_line(output_length=10**8), "line 2: output_length: .* less than or equal to 10000000"),
        (block_line(hash_ids=[0, -1]), r"line 2: hash_ids\.1: .* greater than or equal to 0"),
        (block_line(hash_ids=[2**31]), r"line 2: hash_ids\.0: .* less than 536870912"),
        (block_line(hash_ids=[-1] * 99), ".*; 91 more"),
        (block_line(timestamp=-1), "line 2: timestamp: .* greater than or equal to 0"),
        (block_line(timestamp=float("nan")), "line 2: timestamp: .* finite number"),
        (block_line(timestamp=1e15), r"blocks-1 arrives at 1e\+12 s, not between 0 and 2.6784e\+06 s"),
        ("[" * 100_000 + "\n", "line 2: line: Invalid JSON: recursion limit exceeded"),
    ],
)
def test_a_line_of_blocks_that_cannot_be_is_named_with_its_limit(tmp_path, text, problem):
    path = tmp_path / "bad"
    path.write_text(block_line() + text)
    with pytest.raises(ConfigurationError, match=f"bad is not of kind 'blocks': ValueError {problem}") as raised:
        read_trace(path)
    assert "\n" not in raised.value.message and "http" not in raised.value.message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (block_line(hash_ids=[0]), "no line has the more than 3 hash_ids"),
        (AZURE + "2023-11-16 18:17:03,5,-1\n", "azure-0 has 5 tokens in and -1 out"),
        (AZURE + "2023-11-16 18:17:03,5.5,1\n", "'5.5'"),
        (AZURE + "2023-11-16 18:17:03,99999999,1\n", "a prompt of 99999999 tokens; at most 10000000"),
        (AZURE + "2023-11-16 18:17:03,1,1\n2023-11-16 18:17:01,1,1\n", "azure-1 arrives at -2 s"),
        (AZURE + f"{'x' * 200_000},1,1\n", "field larger than field limit"),
        (SERVEGEN + "nan,a,1,1\n", "servegen-0 arrives at nan s"),
        (SERVEGEN + "inf,a,1,1\n", "servegen-0 arrives at inf s"),
        (json.dumps(session("s", block_size=0)), "ZeroDivisionError"),
        (json.dumps(session("s")).replace('"in": 300', '"in": 300.5'), "s-main-0 has a prompt whose tokens"),
        ('{"hash_id_scope": ' + "[" * 100_000, "recursion"),
    ],
)  # fmt: skip
def test_loads_of_every_kind_that_cannot_be_are_refused(tmp_path, text, problem):
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=f"bad is not of kind .*{problem}"):
        read_trace(path)


def test_a_torn_or_broken_archive_is_named(tmp_path):
    path = write(tmp_path / "trace.jsonl.gz", "".join(block_line(timestamp=i) for i in range(5000)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigurationError, match=r"cannot read trace .*trace.jsonl.gz: .*end-of-stream"):
        read_trace(path)
    path.write_bytes(whole[:600] + b"\xff" * 600 + whole[1200:])
    with pytest.raises(ConfigurationError, match=r"cannot read trace .*trace.jsonl.gz: Error -3"):
        read_trace(path)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1e-9, 1e9, float("inf"), float("nan")])
def test_scaling_leaves_some_requests_and_makes_not_too_many(factor):
    trace = [plain_request(f"r{number}", number, 10, 10, number) for number in range(20)]
    with pytest.raises(ValueError, match="20 requests cannot be scaled to less than one, or more than 10000000"):
        scale(trace, factor, seed=1)
