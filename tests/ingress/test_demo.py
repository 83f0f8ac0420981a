"""`baton demo` against a server that wants a key and whose model writes what looks like markup."""

from collections.abc import AsyncGenerator
from dataclasses import replace

from typer.testing import CliRunner

from cluster.cli import app
from cluster.demo import MAX_TOKENS
from cluster.ingress.generation import Generation, GenerationEvent, GenerationReport
from tests.ingress.scripted import PHASES


def test_the_demo_shows_its_key_and_every_character_of_the_text(make_server, model):
    ids = model.tokenizer.encode(["[/INST] "], False)[0]
    phases = replace(PHASES, fetching_s=0.5)

    async def script(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        for i in range(MAX_TOKENS):
            report = GenerationReport(generation.placement, None, "d0", 0, phases) if i == MAX_TOKENS - 1 else None
            yield GenerationEvent((ids[i % len(ids)],), finish_reason="length" if report else None, report=report)

    server = make_server(script, api_key="secret")
    result = CliRunner().invoke(app, ["demo", "--port", str(server.address[1]), "--api-key", "secret"])
    assert result.exit_code == 0, result.output
    assert result.output.count("the same tokens either way") == 3
    assert result.output.count("local [/INST]") == 3
