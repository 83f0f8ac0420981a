"""What a running scheduler heard and decided, in a file that `baton replay` reads."""

from typer.testing import CliRunner

import cluster.scheduler_service as service
from cluster.decision_record import DecisionRecorder, read_config, read_events
from cluster.scheduler.decision import DecisionMaker
from core.config import PoolConfig, SchedulerConfig
from simulator.replay import replay
from simulator.replay_command import app
from tests.fleet.in_process_fleet import generate, running_fleet


async def test_a_running_scheduler_writes_what_the_command_replays(tiny_llama, tmp_path, monkeypatch):
    path = tmp_path / "s.decisions"
    recorder = DecisionRecorder(path, SchedulerConfig(), 2**24)
    start = service.SchedulerService.__init__

    def with_recorder(self, *args, **more) -> None:
        start(self, *args, **more, recorder=recorder)

    monkeypatch.setattr(service.SchedulerService, "__init__", with_recorder)
    async with running_fleet(tiny_llama[0], 1, 2, pool=PoolConfig(num_blocks=64, max_num_seqs=4)) as fleet:
        for number in range(4):
            await generate(fleet, f"r{number}", list(range(40 + number)), 6)
        await fleet.until_quiet()
    outcome = CliRunner().invoke(app, [str(path), "--policy", "least-outstanding"])
    assert outcome.exit_code == 0, outcome.output
    assert "4 decisions" in outcome.output and "TTFT foreseen" in outcome.output
    events = list(read_events(path))
    assert len(replay(events, read_config(path), DecisionMaker(read_config(path)))) == 4
