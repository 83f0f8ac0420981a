"""`baton simulate` from files to tables, pictures, records and one page; and the arithmetic of its summaries."""

import gzip
import json
import re
import subprocess
import sys
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from core.errors import ConfigurationError
from simulator.fleet_spec import load_fleet
from simulator.records import GapHistogram, Record
from simulator.summary import Percentiles, percentiles, summarize
from simulator.twin import Result, Twin
from tests.simulator.costs import COSTS, small_fleet
from tests.simulator.test_whole_fleets import random_trace

FLEETS = Path(__file__).parents[2] / "simulator" / "fleets"
FLEET = """
model: llama-3.1-8b
gpu: h100
block_size: 64
prefill: {replicas: 1, max_num_seqs: 16}
decode: {replicas: 2, max_num_seqs: 64}
report: {interval_s: 0.5}
slo: {ttft_s: 1.0, tpot_s: 0.03}
"""


@pytest.fixture
def files(tmp_path):
    lines = [
        {
            "timestamp": 300 * i,
            "input_length": 2000 + i,
            "output_length": 20,
            "hash_ids": [7, 100 + i, 200 + i, 300 + i],
        }
        for i in range(40)
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "fleet.yaml").write_text(FLEET)
    return tmp_path


def simulate(files, *options: str):
    named = ("--trace", str(files / "trace.jsonl"), "--fleet", str(files / "fleet.yaml"))
    return CliRunner().invoke(app, ["simulate", *named, *options])


def test_policies_side_by_side(files):
    out = files / "out"
    done = simulate(files, "--policy", "baton", "--policy", "round-robin", "--out", str(out), "--seed", "3")
    assert done.exit_code == 0, done.output
    assert "round-robin: 40 requests" in done.output and "every 0.5 s" in done.output
    tree = json.loads((out / "result.json").read_text())
    assert set(tree["runs"]) == {"baton", "round-robin"}
    for name, run in tree["runs"].items():
        summary = run["summary"]
        assert summary["num_arrived"] == summary["num_completed"] == 40
        assert 0.1 < summary["hit_rate"] < 0.4  # a quarter of each prompt is common to all
        with gzip.open(out / f"records-{name}.jsonl.gz", "rt") as file:
            records = [json.loads(line) for line in file]
        assert len(records) == 40 and all(record["outcome"] == "length" for record in records)
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert json.loads(re.search(r'id="result">(.*)</script>', page, re.DOTALL).group(1)) == tree
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_more_of_the_same_load(files):
    done = simulate(files, "--rate-scale", "3", "--limit", "100")
    assert done.exit_code == 0, done.output
    assert "baton: 100 requests" in done.output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--policy", "best"), "policy 'best' is none of baton"),
        (("--kind", "azure"), "is not of kind 'azure'"),
        (("--rate-scale", "0"), "--rate-scale 0: 40 requests cannot be scaled"),
        (("--rate-scale", "nan"), "--rate-scale nan: 40 requests cannot be scaled"),
        (("--report-interval", "0"), "--report-interval: interval_s: Input should be greater than or equal to 0.001"),
        (("--report-interval", "nan"), "--report-interval: interval_s: Input should be a finite number"),
    ],
)
def test_what_is_wrong_is_said(files, options, complaint):
    done = simulate(files, *options)
    assert done.exit_code == 1 and complaint in " ".join(done.output.split())


def test_sessions_of_one_id_are_refused_before_anything_runs(files):
    requests = [{"t": 0.0, "in": 300, "out": 4, "hash_runs": [[1, 4]]}]
    one = {"id": "a", "block_size": 64, "hash_id_scope": "local", "tool_tokens": 0, "system_tokens": 0}
    (files / "trace.jsonl").write_text(f"{json.dumps(one | {'requests': requests})}\n" * 2)
    done = simulate(files)
    assert done.exit_code == 1 and "session id 'a' is used twice" in " ".join(done.output.split())


def test_a_fleet_file_is_guarded(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text("decode: {replicas: 1, num_blocks: 10, speed: 3}\nlink: {kind: tcp, bytes_per_s: 5}\nmodle: x")
    with pytest.raises(ConfigurationError, match=r"decode.speed.*link.*say either kind or bytes_per_s.*modle"):
        load_fleet(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("decode: {replicas: 100001}", "decode.replicas: .* less than or equal to 100000"),
        ("decode: {}\nreport: {interval_s: 0.0001}", "report.interval_s: .* greater than or equal to 0.001"),
        ("decode: {}\nsample_s: 1.0e-9", "sample_s: .* greater than or equal to 0.1"),
        ("decode: {}\nautoscaling: {interval_s: 1.0e-9}", "autoscaling.interval_s: .* greater than or equal to 0.1"),
        ("decode: {}\ntransfer: {lease_ttl_s: 1.0e-9}", "transfer.lease_ttl_s: .* greater than or equal to 0.1"),
        ("decode: {}\nscheduler: {tenant_weights: {a: .inf}}", "scheduler.tenant_weights.a: .* finite"),
        ("decode: {}\nlink: {bytes_per_s: .inf}", "link.bytes_per_s: .* finite"),
        ("decode: {speeds: {0: 0}}", r"decode.speeds.0: .* greater than 0"),
        ("decode: {", "no YAML: while parsing a flow node"),
        ("decode: 2023-99-99", "no YAML: month must be"),
        ("[" * 10_000, "no YAML"),
    ],
)
def test_a_fleet_that_cannot_be_is_named_with_its_limit(tmp_path, text, problem):
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=f"fleet.yaml: {problem}") as raised:
        load_fleet(path)
    assert "\n" not in raised.value.message


def record(number: int, ttft_s: float, tpot_s: float, outcome: str = "length") -> Record:
    first_s = number + ttft_s
    numbers = (0.0, 100, 11, 50, tpot_s, tpot_s, tpot_s)
    return Record(f"r{number}", float(number), first_s, first_s + 1, *numbers, "p", "d", "pair", 0.0, 1, 2**20, outcome)


def test_goodput_counts_all_arrivals():
    good = [record(number, 1.0, 0.01) for number in range(18)]
    spec = small_fleet(1, 1, slo__ttft_s=2.0, slo__tpot_s=0.02)
    sampler = Twin(spec, COSTS).sampler

    def summary(*others: Record):
        return summarize(Result([*good, *others], GapHistogram(), sampler, 30.0, 1, 1, 2**30, 0), spec)

    slow = summary(record(18, 1.0, 0.03), record(19, 1.0, 0.01))
    assert slow.good_share == 0.95 and slow.goodput_at_90_per_s == 20 / 19 and slow.goodput_at_99_per_s == 0.0
    refused = summary(record(18, nan, 0.0, "Overloaded"), record(19, nan, 0.0, "RequestTimeout"))
    assert refused.good_share == 0.9 and refused.num_completed == 18
    assert refused.ttft.p99 == 1.0 and refused.ttft_of_all == Percentiles(1.0, 1.0, inf)
    assert summary(record(18, 1.0, 0.02), record(19, 2.0, 0.01)).goodput_at_99_per_s == 20 / 19
    assert slow.hit_rate == 0.5 and slow.transfer_gib == 1.0


def test_percentiles_are_of_the_nearest_rank():
    assert percentiles([float(number) for number in range(1, 101)]) == Percentiles(50.0, 90.0, 99.0)
    assert percentiles([3.0]) == Percentiles(3.0, 3.0, 3.0)


def test_gaps_of_all_tokens_are_right_to_half_a_percent():
    result = Twin(small_fleet(2, 2), COSTS, seed=1).run(random_trace(1))
    histogram = result.gaps.percentiles((0.5, 0.99))
    means = [r.itl_mean_s for r in result.records if r.num_output_tokens > 1]
    assert min(means) * 0.99 < histogram[0] < max(r.itl_max_s for r in result.records)
    even = GapHistogram()
    even.add(np.full(1000, 0.0123))
    assert even.percentiles((0.5,))[0] == pytest.approx(0.0123, rel=0.005)


@pytest.mark.parametrize("path", sorted(FLEETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_fleets_run(path, files):
    done = CliRunner().invoke(app, ["simulate", "--trace", str(files / "trace.jsonl"), "--fleet", str(path)])
    assert done.exit_code == 0, done.output
    assert "40 length" in done.output


def test_simulation_loads_no_torch_ray_or_grpc():
    probe = "import sys, simulator.command; print(*sorted({'torch', 'ray', 'grpc'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).split() == []
