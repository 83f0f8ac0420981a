"""`baton replay`: what another policy, or other settings of the production one, would have decided."""

from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.decision_record import read_config, read_events
from core.config import SchedulerConfig, parse_yaml
from core.errors import ConfigurationError
from core.section import problems_in
from simulator.baselines.catalog import POLICIES, find_policy
from simulator.fleet_spec import FleetSpec, PoolSection
from simulator.replay import Replay, Replayed, replay

app = typer.Typer(add_completion=False)


@app.command()
def replay_decisions(
    record: Annotated[Path, typer.Argument(help="a file of `scheduler.record_dir`")],
    policy: Annotated[str, typer.Option(help=f"one of {', '.join(POLICIES)}")] = "baton",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the scheduler's section, for the other policy")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the policy's draws")] = 0,
) -> None:
    """Replay recorded decisions against another policy or other settings, each with what was foreseen of it."""
    config = read_config(record)
    spec = FleetSpec(decode=PoolSection(), scheduler=changed(config, setting or []))
    outcome = replay(read_events(record), config, find_policy(policy)(spec, seed))
    if not outcome.decisions:
        raise ConfigurationError(f"{record} holds no decision")
    Console(highlight=False).print(summary(outcome, policy))


def changed(config: SchedulerConfig, settings: list[str]) -> SchedulerConfig:
    """With `KEY=VALUE` settings in place. Raises ConfigurationError naming a wrong one."""
    tree = config.model_dump()
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals or key not in tree:
            raise ConfigurationError(f"--set {word}: one of {', '.join(tree)} = value is asked", field=key)
        try:
            tree[key] = parse_yaml(value)
        except ValueError as error:
            raise ConfigurationError(f"--set {word}: {error}", field=key) from error
    try:
        return SchedulerConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigurationError(f"--set {problems_in(error, 'scheduler')}") from error


def summary(outcome: Replay, policy: str) -> Table:
    """Agreement, and TTFT foreseen for both where both were."""
    replayed = outcome.decisions
    table = Table("", "recorded", policy, title=f"{len(replayed)} decisions", title_justify="left")
    both = [(r.recorded_s, r.chosen_s) for r in replayed if r.recorded_s is not None and r.chosen_s is not None]
    table.add_row("same replicas", "", f"{fmean(r.agrees for r in replayed):.1%}")
    table.add_row("refused, given up or left waiting", str(outcome.num_unplanned), "")
    table.add_row("would have waited", "", str(sum(r.chosen is None for r in replayed)))
    local = [f"{fmean(not pair[0] for pair in pairs):.1%}" for pairs in _pairs(replayed)]
    table.add_row("prefilled on decode", *local)
    for name, of in (("mean", fmean), ("median", median)):
        if both:
            table.add_row(
                f"{name} TTFT foreseen, ms", *(f"{1000 * of(column):.1f}" for column in zip(*both, strict=True))
            )
    measured = [r.measured_s for r in replayed if r.measured_s is not None]
    if measured:
        table.add_row("mean first token measured, ms", f"{1000 * fmean(measured):.1f}", "")
    return table


def _pairs(replayed: list[Replayed]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    return [r.recorded for r in replayed], [r.chosen for r in replayed if r.chosen is not None] or [("-", "")]
