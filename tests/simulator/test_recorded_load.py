"""Records of a scheduler as loads: arrivals, lengths and common prefixes are those that were asked for."""

import pytest

from cluster.decision_record import DecisionRecorder
from core.config import SchedulerConfig
from core.errors import ConfigurationError
from core.messages.to_scheduler import Finish, Report, Reserve
from simulator.traces.decisions import read_decisions
from simulator.traces.readers import read_trace
from simulator.traces.trace import expand
from simulator.twin import Twin
from tests.simulator.costs import COSTS
from tests.simulator.test_replay import recorded_run, write_record
from tests.simulator.test_whole_fleets import random_trace

BLOCK = 4


def reserve(name: str, attempt: int, num_tokens: int, hashes: tuple[bytes, ...], **more) -> Reserve:
    return Reserve(name, attempt, "i", num_tokens, 50, hashes, 10.0, **more)


@pytest.fixture
def report(monkeypatch) -> Report:
    return next(event for _, event in recorded_run(monkeypatch)[1] if isinstance(event, Report))


def test_prompts_that_began_alike_begin_alike(report):
    events = [
        (10.0, report),
        (11.0, reserve("a", 0, 10, (b"1", b"2"), tenant="blue")),
        (11.5, reserve("b", 0, 9, (b"1", b"3"))),
        (12.0, Finish("a", 0)),  # decode handed it back with 3 tokens shown
        (12.1, reserve("a", 1, 13, (b"1", b"2", b"4"))),
        (13.0, Finish("a", 1, 20)),
        (14.0, reserve("a", 0, 3, ())),  # another one of that name, which never ended
    ]
    first, second, third = read_decisions(events)
    assert [one.arrival_s for one in (first, second, third)] == [0.0, 0.5, 3.0]
    assert [one.num_prompt_tokens for one in (first, second, third)] == [10, 9, 3]
    assert [one.num_output_tokens for one in (first, second, third)] == [20, 50, 50]
    assert (first.tenant, second.tenant) == ("blue", "")
    one, other = expand(first.prompt), expand(second.prompt)
    assert one[:BLOCK] == other[:BLOCK] and one[BLOCK:] != other[BLOCK:]
    assert not set(one[BLOCK:]) & set(other[BLOCK:])
    assert len({one.request_id for one in (first, second, third)}) == 3


def test_a_lost_answer_asked_for_again_is_one_request(report):
    twice = [(0.0, report), (1.0, reserve("a", 0, 5, ())), (1.2, reserve("a", 0, 5, ())), (2.0, Finish("a", 0, 7))]
    (only,) = read_decisions(twice)
    assert (only.arrival_s, only.num_output_tokens) == (0.0, 7)


def test_a_record_of_a_run_is_its_trace(monkeypatch, tmp_path):
    spec, events = recorded_run(monkeypatch)
    path = tmp_path / "s.decisions"
    write_record(path, spec, events, 2**26)
    played = sorted(random_trace(1, num_requests=120), key=lambda one: one.arrival_s)
    found = read_decisions(events)
    assert [len(one.prompt) > 0 for one in found] == [True] * len(played)
    for before, after in zip(played, found, strict=True):
        assert after.arrival_s == pytest.approx(before.arrival_s - played[0].arrival_s, abs=0.05)
        assert after.num_prompt_tokens == before.num_prompt_tokens
        assert after.num_output_tokens == before.num_output_tokens

    def num_common(one, other) -> int:
        """Whole blocks that two prompts begin with together."""
        one, other = expand(one.prompt), expand(other.prompt)
        longest = min(len(one), len(other)) // BLOCK
        return next((i for i in range(longest) if one[: BLOCK * (i + 1)] != other[: BLOCK * (i + 1)]), longest)

    pairs = [(i, j) for i in range(40) for j in range(i) if played[i].tenant == played[j].tenant]
    assert [num_common(found[i], found[j]) for i, j in pairs] == [num_common(played[i], played[j]) for i, j in pairs]
    assert any(num_common(found[i], found[j]) > 1 for i, j in pairs)
    read = read_trace(path)  # the recorder's own clock: all at once
    assert [one.prompt for one in read] == [one.prompt for one in found]
    assert len(Twin(spec, COSTS).run(found).records) == len(played)


def test_what_tells_no_block_size_is_refused(tmp_path):
    path = tmp_path / "s.decisions"
    recorder = DecisionRecorder(path, SchedulerConfig(), 2**20)
    recorder.note(reserve("a", 0, 5, ()))
    recorder.close()
    with pytest.raises(ConfigurationError, match="size of a block"):
        read_trace(path)
