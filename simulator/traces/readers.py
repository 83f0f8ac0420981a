"""Reads recorded traces, whatever their kind, into requests in order of arrival.

    blocks      JSON lines with `timestamp` (ms), `input_length`, `output_length`, `hash_ids`: Mooncake's, ShareGPT's
    azure       CSV with TIMESTAMP, ContextTokens, GeneratedTokens
    servegen    CSV with t_s, client, input_tokens, output_tokens
    clients     CSV with t_s, client, rate_rps, pattern, shape, and beside it the clients' lengths: arrivals are drawn
    sessions    JSON lines of agent sessions with runs of block ids
    dynamo      JSON lines of Dynamo's request trace
    lengths     CSV with num_prefill_tokens, num_decode_tokens and no times: arrivals are drawn
    decisions   what a global scheduler of ours wrote into its `scheduler.record_dir`

The others than `decisions` may be gzipped. All draws are by `seed`.
"""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from random import Random
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from cluster.decision_record import is_record, read_events
from core.errors import ConfigurationError
from core.section import problems_in
from simulator.traces.agent_sessions import read_sessions
from simulator.traces.block_ids import Row, read_block_ids
from simulator.traces.client_mixes import Histograms, Rate, draw_clients
from simulator.traces.decisions import read_decisions
from simulator.traces.dynamo import Line, read_dynamo
from simulator.traces.kinds import KINDS, LENGTHS, RATES, kind_of, why_no_trace
from simulator.traces.trace import TracedRequest, plain_request, require_playable

_ROW, _LINE = TypeAdapter(Row), TypeAdapter(Line)
_RATE, _HISTOGRAMS = TypeAdapter(Rate), TypeAdapter(Histograms)
MOST_HEAD_BYTES = 1 << 20  # of the first line, where it has no end
Guarded = TypeVar("Guarded")
LENGTHS_RATE = 1.0  # requests per second of a trace without times; `scale` changes it


def read_trace(path: Path, kind: str = "auto", seed: int = 0) -> list[TracedRequest]:
    """Requests by arrival, the first one at 0 s. Raises ConfigurationError naming the file and what it lacks."""
    if kind not in KINDS:
        raise ConfigurationError(f"trace kind {kind!r} is not known; known are {', '.join(KINDS)}", field="kind")
    chosen = kind
    try:
        chosen = _kind_of(path, kind)
        if chosen == "decisions":
            requests = read_decisions(read_events(path))
        elif chosen == "clients":
            requests = _clients(path, Random(seed))
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
    twice = [name for name, number in Counter(request.request_id for request in requests).items() if number > 1]
    if twice:
        raise ConfigurationError(f"trace {path} has request id {twice[0]!r} twice")
    return sorted(requests, key=lambda request: (request.arrival_s, request.request_id))


def _open(path: Path) -> TextIOWrapper:
    return TextIOWrapper(gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _kind_of(path: Path, kind: str) -> str:
    """The kind that was named, else that of the file. Raises ConfigurationError for what is no trace."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        head = file.readline(MOST_HEAD_BYTES).decode(errors="replace")
    if (told := why_no_trace(head)) is not None:
        raise ConfigurationError(f"{path} is no trace by itself: it tells {told}")
    found = kind if kind != "auto" else "decisions" if is_record(path) else kind_of(head)
    if found is None:
        raise ConfigurationError(f"trace {path} begins like none of {', '.join(KINDS[1:])}")
    return found


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


def _clients(path: Path, random: Random) -> list[TracedRequest]:
    before, found, after = path.name.rpartition(RATES)
    beside = [path.with_name(before + LENGTHS + end) for end in dict.fromkeys((after, "", ".gz"))] if found else []
    lengths = next((one for one in beside if one.exists()), None)
    if lengths is None:
        wanted = beside[0] if beside else f"no {RATES} in its name, where {LENGTHS} would stand in theirs"
        raise ConfigurationError(f"trace {path} lacks the file of its clients' lengths: {wanted}")
    with _open(path) as file:
        rates = [_guarded(_RATE, f"line {number}", row) for number, row in enumerate(csv.DictReader(file), 2)]
    with _open(lengths) as file:
        histograms = list(_json_lines(_HISTOGRAMS, file, f"{lengths.name} "))
    return draw_clients(rates, histograms, random)


def _blocks(file: TextIOWrapper, random: Random) -> Iterator[TracedRequest]:
    return read_block_ids(list(_json_lines(_ROW, file)), random)


def _dynamo(file: TextIOWrapper, _: Random) -> Iterator[TracedRequest]:
    return iter(read_dynamo(_json_lines(_LINE, file)))


def _json_lines(adapter: TypeAdapter[Guarded], file: TextIOWrapper, where: str = "") -> Iterator[Guarded]:
    """Raises ValueError naming the line and its wrong fields."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _guarded(adapter, f"{where}line {number}", line)


def _guarded(adapter: TypeAdapter[Guarded], where: str, row: str | dict[str, str]) -> Guarded:
    try:
        return adapter.validate_json(row) if isinstance(row, str) else adapter.validate_python(row)
    except ValidationError as error:
        raise ValueError(f"{where}: {problems_in(error, 'line')}") from error


def _sessions(file: TextIOWrapper, random: Random) -> Iterator[TracedRequest]:
    return read_sessions((json.loads(line) for line in file if line.strip()), random)


_READERS = {
    "azure": _azure,
    "servegen": _servegen,
    "lengths": _lengths,
    "blocks": _blocks,
    "sessions": _sessions,
    "dynamo": _dynamo,
}
