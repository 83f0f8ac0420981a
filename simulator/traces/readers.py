"""Reads recorded traces, whatever their kind, into requests in order of arrival.

    blocks      JSON lines with `timestamp` (ms), `input_length`, `output_length`, `hash_ids`: Mooncake's, ShareGPT's
    azure       CSV with TIMESTAMP, ContextTokens, GeneratedTokens
    servegen    CSV with t_s, client, input_tokens, output_tokens
    sessions    JSON lines of agent sessions with runs of block ids
    lengths     CSV with num_prefill_tokens, num_decode_tokens and no times: arrivals are drawn
    decisions   what a global scheduler of ours wrote into its `scheduler.record_dir`

The others than `decisions` may be gzipped. All draws are by `seed`.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from random import Random

from pydantic import TypeAdapter, ValidationError

from cluster.decision_record import is_record, read_events
from core.errors import ConfigurationError
from core.section import problems_in
from simulator.traces.agent_sessions import read_sessions
from simulator.traces.block_ids import Row, read_block_ids
from simulator.traces.decisions import read_decisions
from simulator.traces.trace import TracedRequest, plain_request, require_playable

KINDS = ("auto", "blocks", "azure", "servegen", "sessions", "lengths", "decisions")
_ROW = TypeAdapter(Row)
LENGTHS_RATE = 1.0  # requests per second of a trace without times; `scale` changes it


def read_trace(path: Path, kind: str = "auto", seed: int = 0) -> list[TracedRequest]:
    """Requests by arrival, the first one at 0 s. Raises ConfigurationError naming the file and what it lacks."""
    if kind not in KINDS:
        raise ConfigurationError(f"trace kind {kind!r} is not known; known are {', '.join(KINDS)}", field="kind")
    chosen = kind
    try:
        if kind == "auto":
            chosen = "decisions" if is_record(path) else _kind_of(path)
        if chosen == "decisions":
            requests = read_decisions(read_events(path))
        else:
            with _open(path) as file:
                requests = list(_READERS[chosen](file, Random(seed)))
        for request in requests:
            require_playable(request)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read trace {path}: {error}") from error
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error) as error:
        raise ConfigurationError(f"trace {path} is not of kind {chosen!r}: {type(error).__name__} {error}") from error
    if not requests:
        raise ConfigurationError(f"trace {path} holds no request")
    return sorted(requests, key=lambda request: (request.arrival_s, request.request_id))


def _open(path: Path) -> TextIOWrapper:
    return TextIOWrapper(gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _kind_of(path: Path) -> str:
    with _open(path) as file:
        head = file.readline()
    if head.startswith("TIMESTAMP,ContextTokens"):
        return "azure"
    if head.startswith("t_s,client,input_tokens"):
        return "servegen"
    if head.startswith("num_prefill_tokens"):
        return "lengths"
    if head.startswith("{") and '"hash_ids"' in head:
        return "blocks"
    if head.startswith("{") and '"hash_id_scope"' in head:
        return "sessions"
    raise ConfigurationError(f"trace {path} begins like none of {', '.join(KINDS[1:])}")


def _azure(file: TextIOWrapper, _: Random) -> Iterator[TracedRequest]:
    first: datetime | None = None
    for number, row in enumerate(csv.DictReader(file)):
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])
        first = first or at
        arrival_s = (at - first).total_seconds()
        yield plain_request(
            f"azure-{number}", arrival_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]), number
        )


def _servegen(file: TextIOWrapper, _: Random) -> Iterator[TracedRequest]:
    for number, row in enumerate(csv.DictReader(file)):
        lengths = int(row["input_tokens"]), int(row["output_tokens"])
        yield plain_request(f"servegen-{number}", float(row["t_s"]), *lengths, number, tenant=row["client"])


def _lengths(file: TextIOWrapper, random: Random) -> Iterator[TracedRequest]:
    """Poisson arrivals."""
    arrival_s = 0.0
    for number, row in enumerate(csv.DictReader(file)):
        lengths = int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])
        yield plain_request(f"lengths-{number}", arrival_s, *lengths, number)
        arrival_s += random.expovariate(LENGTHS_RATE)


def _blocks(file: TextIOWrapper, random: Random) -> Iterator[TracedRequest]:
    lines = enumerate(file, 1)
    return read_block_ids([_row(number, line) for number, line in lines if line.strip()], random)


def _row(number: int, line: str) -> Row:
    try:
        return _ROW.validate_json(line)
    except ValidationError as error:
        raise ValueError(f"line {number}: {problems_in(error, 'line')}") from error


def _sessions(file: TextIOWrapper, random: Random) -> Iterator[TracedRequest]:
    return read_sessions((json.loads(line) for line in file if line.strip()), random)


_READERS = {"azure": _azure, "servegen": _servegen, "lengths": _lengths, "blocks": _blocks, "sessions": _sessions}
