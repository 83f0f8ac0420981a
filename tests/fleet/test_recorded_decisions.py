"""What a running scheduler heard and decided, in a file that `baton replay` reads."""

from typer.testing import CliRunner

from cluster.decision_record import DecisionRecorder, read_config, read_events
from cluster.scheduler.decision import DecisionMaker
from core.config import PoolConfig, SchedulerConfig
from simulator.replay import replay
from simulator.replay_command import app
from tests.fleet.in_process_fleet import generate, running_fleet


async def test_a_running_scheduler_writes_what_the_command_replays(tiny_llama, tmp_path):
    path = tmp_path / "s.decisions"
    scheduler = SchedulerConfig(local_prefill_max_tokens=0)
    recorder = DecisionRecorder(path, scheduler, 2**24)
    pool = PoolConfig(num_blocks=64, max_num_seqs=4)
    async with running_fleet(tiny_llama[0], 1, 2, pool, scheduler=scheduler, recorder=recorder) as fleet:
        for number in range(4):
            await generate(fleet, f"r{number}", list(range(40 + number)), 6)
        await fleet.until_quiet()
    outcome = CliRunner().invoke(app, [str(path), "--policy", "least-outstanding"])
    assert outcome.exit_code == 0, outcome.output
    assert "4 decisions" in outcome.output and "TTFT foreseen" in outcome.output
    events = list(read_events(path))
    assert len(replay(events, read_config(path), DecisionMaker(read_config(path))).decisions) == 4
