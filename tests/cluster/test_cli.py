"""The command line, as far as it goes without a cluster."""

import socket
from importlib.metadata import version

import click
import pytest
import typer
from typer.testing import CliRunner

from cluster.cli import app

runner = CliRunner()


def test_version_is_the_distributions():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, f"baton {version('baton-llm')}")


def test_every_command_that_help_lists_is_one():
    command = typer.main.get_command(app)
    context = click.Context(command)
    names = command.list_commands(context)
    assert {"serve", "why", "simulate", "replay"} <= set(names)
    assert [command.get_command(context, name).name for name in names] == names


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "/nowhere.yaml"], "/nowhere.yaml"),
        (["serve", "--model", "/nowhere"], "config.json is missing"),
        (["chat", "--url", "http://127.0.0.1:1"], "baton serve"),
        (["traffic", "[/v1]=half"], "'[/v1]=half' is not GENERATION=WEIGHT"),
        (["traffic", "v1=nan"], "'v1=nan' is not GENERATION=WEIGHT"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(arguments, says):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert says in " ".join(result.stdout.split())
    assert "Traceback" not in result.stdout


def test_a_busy_port_is_named_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = runner.invoke(app, ["serve", "--port", str(port)])
    assert result.exit_code == 1
    assert f"127.0.0.1:{port} is in use" in result.stdout and "--port" in result.stdout
