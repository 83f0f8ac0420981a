"""Records of decisions: written by a scheduler that runs, read whole or torn, played to other policies."""

import errno
import struct
from math import nan
from pathlib import Path

import pytest

from cluster.decision_record import MAGIC, DecisionRecorder, read_config, read_events
from cluster.scheduler.admission import Admission
from cluster.scheduler.decision import DecisionMaker
from core.config import SchedulerConfig
from core.errors import BatonError, ConfigurationError
from core.messages.to_scheduler import Deregister, Finish, Plan, Progress, Report, Reserve
from simulator.baselines.catalog import find_policy
from simulator.fleet_spec import FleetSpec, PoolSection
from simulator.replay import replay
from simulator.replay_command import changed, summary
from simulator.traces.readers import read_trace
from simulator.twin import Twin
from tests.cluster.scheduler_world import World
from tests.simulator.costs import COSTS, small_fleet
from tests.simulator.test_whole_fleets import random_trace


class Recorded(Admission):
    """The production class, which also writes down what it hears, as SchedulerService does."""

    events: list[tuple[float, object]]

    def report(self, report: Report, now: float) -> None:
        self.events.append((now, report))
        super().report(report, now)

    def replica_lost(self, replica_id: str) -> None:
        self.events.append((self.events[-1][0], Deregister(replica_id, 0)))
        super().replica_lost(replica_id)

    def reserve(self, request: Reserve, now: float) -> None:
        self.events.append((now, request))
        super().reserve(request, now)

    def dispatch(self, now: float) -> list[Plan]:
        plans = super().dispatch(now)
        self.events += [(now, plan) for plan in plans]
        return plans

    def progress(self, message: Progress, now: float) -> None:
        self.events.append((now, message))
        super().progress(message, now)

    def finish(self, request_id: str, attempt: int, now: float, num_output_tokens: int | None = None) -> None:
        self.events.append((now, Finish(request_id, attempt, num_output_tokens)))
        super().finish(request_id, attempt, now, num_output_tokens)


def recorded_run(monkeypatch, seed: int = 1) -> tuple[FleetSpec, list[tuple[float, object]]]:
    """All that the scheduler of a twin heard and decided."""
    events: list[tuple[float, object]] = []
    monkeypatch.setattr(Recorded, "events", events, raising=False)
    monkeypatch.setattr("simulator.twin.Admission", Recorded)
    spec = small_fleet(2, 3, decode__num_blocks=200, prefill__num_blocks=200)
    result = Twin(spec, COSTS, seed=seed).run(random_trace(seed, num_requests=120))
    assert sum(record.is_completed for record in result.records) > 100
    return spec, events


def write_record(path: Path, spec: FleetSpec, events: list[tuple[float, object]], max_bytes: int) -> None:
    """As a scheduler does, at the recorder's own clock."""
    recorder = DecisionRecorder(path, spec.scheduler, max_bytes)
    for _, event in events:
        recorder.note(event)
    recorder.close()


def test_the_same_policy_decides_as_it_did(monkeypatch):
    spec, events = recorded_run(monkeypatch)
    replayed = replay(events, spec.scheduler, DecisionMaker(spec.scheduler)).decisions
    plans = [event for _, event in events if isinstance(event, Plan)]
    assert [one.request_id for one in replayed] == [plan.request_id for plan in plans]
    assert sum(one.agrees for one in replayed) / len(replayed) > 0.98  # its lists are short, the judge's are not
    for one, plan in zip(replayed, plans, strict=True):
        assert one.recorded == (plan.prefill.replica_id if plan.prefill else "", plan.decode.replica_id)
        if one.recorded_s is not None:
            assert one.recorded_s == pytest.approx(plan.predicted_ttft_s, rel=0.01, abs=1e-4)
    assert sum(one.measured_s is not None for one in replayed) > 100


def test_another_policy_chooses_otherwise_and_is_foreseen_to_be_slower(monkeypatch):
    spec, events = recorded_run(monkeypatch)
    replayed = replay(events, spec.scheduler, find_policy("round-robin")(spec, 0)).decisions
    assert sum(one.agrees for one in replayed) / len(replayed) < 0.7
    on_the_same_decode = sum(one.chosen is not None and one.chosen[1] == one.recorded[1] for one in replayed)
    assert 0 < on_the_same_decode / len(replayed) < 0.7
    both = [(one.recorded_s, one.chosen_s) for one in replayed if None not in (one.recorded_s, one.chosen_s)]
    assert sum(recorded for recorded, _ in both) < 0.9 * sum(chosen for _, chosen in both)


def test_other_settings_are_another_policy(monkeypatch):
    spec, events = recorded_run(monkeypatch)
    others = changed(spec.scheduler, ["local_prefill_max_tokens=0"])
    outcome = replay(events, spec.scheduler, DecisionMaker(others))
    replayed = outcome.decisions
    was_local = [one for one in replayed if not one.recorded[0]]
    assert was_local and all(one.chosen is None or one.chosen[0] for one in was_local)
    table = summary(outcome, "baton")
    assert table.row_count >= 5
    with pytest.raises(ConfigurationError, match="queue_limits"):
        changed(spec.scheduler, ["queue_limits=3"])
    with pytest.raises(ConfigurationError, match="queue_limit: Input should be"):
        changed(spec.scheduler, ["queue_limit=-3"])
    with pytest.raises(ConfigurationError, match=r"--set slo=\{: no YAML: while parsing"):
        changed(spec.scheduler, ["slo={"])


def test_whom_the_scheduler_refused_is_counted_and_harms_nobody(monkeypatch):
    events: list[tuple[float, object]] = []
    monkeypatch.setattr(Recorded, "events", events, raising=False)
    config = SchedulerConfig(replica_timeout_s=1e9, queue_timeout_s=5.0)
    world = World()
    world.admission = Recorded(config)
    world.fleet(0, 2)
    refused: list[str] = []

    def ask(request: Reserve, now: float) -> None:
        try:
            world.admission.reserve(request, now)
        except BatonError as error:
            refused.append(type(error).__name__)
        world.admission.dispatch(now)

    ask(world.request(64), 1.0)
    ask(world.request(64, max_new_tokens=200_000), 1.1)
    stale = world.request(64)
    world.admission.finish(stale.request_id, 0, 1.2)
    ask(stale, 1.3)
    for number in range(2):
        world.report(f"d{number}", now=1.5, num_free_blocks=0, num_running=256)
    for number in range(60):  # nothing moves: sooner or later a wait of more than 5 s is foreseen
        ask(world.request(4000), 2.0 + 0.08 * number)
    assert set(refused) == {"PromptTooLong", "StaleMessage", "Overloaded"}
    num_expired = len(world.admission.expire(20.0))
    num_refused = len(refused)
    ask(world.request(4000), 20.1)  # the line is empty again: it may wait
    for number in range(2):
        world.report(f"d{number}", now=20.5, num_free_blocks=40_000, num_running=0)
    assert len(world.admission.dispatch(20.5)) == 1 and len(refused) == num_refused

    outcome = replay(events, config, DecisionMaker(config))
    plans = [event.request_id for _, event in events if isinstance(event, Plan)]
    assert [one.request_id for one in outcome.decisions] == plans and len(plans) == 2
    assert outcome.num_unplanned == num_refused + num_expired and num_expired > 5


def test_a_file_gives_back_what_was_noted_up_to_where_it_was_torn(tmp_path, monkeypatch):
    spec, events = recorded_run(monkeypatch)
    path = tmp_path / "s.decisions"
    write_record(path, spec, events, 2**24)
    assert read_config(path) == spec.scheduler
    read = list(read_events(path))
    assert [event for _, event in read] == [event for _, event in events]
    assert [seconds for seconds, _ in read] == sorted(seconds for seconds, _ in read)
    path.write_bytes(path.read_bytes()[:-3])
    assert len(list(read_events(path))) == len(events) - 1


def test_a_full_file_ends_with_a_whole_event(tmp_path, monkeypatch, caplog):
    spec, events = recorded_run(monkeypatch)
    write_record(tmp_path / "s", spec, events, 20_000)
    assert (tmp_path / "s").stat().st_size <= 20_000
    kept = [event for _, event in read_events(tmp_path / "s")]
    assert 0 < len(kept) < len(events) and kept == [event for _, event in events[: len(kept)]]
    assert sum("is full" in message for message in caplog.messages) == 1


def test_a_full_disk_ends_the_record_and_nothing_else(monkeypatch, caplog):
    spec, events = recorded_run(monkeypatch)
    write_record(Path("/dev/full"), spec, events, 2**26)
    write_record(Path("/dev/full"), spec, [], 2**26)  # its head is there to be written when it closes
    (first, second) = (message for message in caplog.messages if "/dev/full" in message)
    assert "ends here" in first and "No space left on device" in first and second == first

    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", no_room)
    write_record(Path("new/s.decisions"), spec, events, 2**26)
    assert "new/s.decisions ends here" in caplog.messages[-1]


def test_what_is_no_record_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_config(tmp_path / "missing")
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(ConfigurationError, match="no record of decisions"):
        list(read_events(tmp_path / "other"))
    with pytest.raises(ConfigurationError, match="record_dir"):
        DecisionRecorder(tmp_path / "other" / "s", SchedulerConfig(), 1)


def test_a_record_of_another_version_says_so(tmp_path):
    path = tmp_path / "s"
    path.write_bytes(b"baton decisions 12\nwhatever\xff")
    for read in (read_config, read_trace):
        with pytest.raises(ConfigurationError, match=f"{path} is a record of decisions of version '12'; version 1 is"):
            read(path)
    settings = b'{"queue_limit": 3, "coming": 1}'
    path.write_bytes(MAGIC + struct.pack("<I", len(settings)) + settings)
    with pytest.raises(ConfigurationError, match=r"of this version: coming: Extra inputs are not permitted$"):
        read_config(path)


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ((99, 1.0, 0), r"at byte \d+: kind 99 of 6"),
        ((2, 1.0, 2**32 - 1), "4294967295 bytes of at most 1073741824"),
        ((2, nan, 0), "nan s"),
        ((2, 1.0, 1), "malformed Reserve: message: Input should be"),
    ],
)
def test_a_broken_event_is_named(tmp_path, head, problem):
    path = tmp_path / "s"
    DecisionRecorder(path, SchedulerConfig(), 2**20).close()
    path.write_bytes(path.read_bytes() + struct.pack("<BdI", *head) + b"\x01")
    with pytest.raises(ConfigurationError, match=f"{path} holds what is no event.*{problem}"):
        list(read_events(path))


def test_the_policies_of_the_catalog_need_no_more_of_a_fleet():
    spec = FleetSpec(decode=PoolSection())
    assert find_policy("mooncake")(spec, 0) is not None
