"""Goodput: the search for a rate, tuning at equal cost, loads made of a trace, and one small cell from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.goodput import Budget, Cell, good_share, measure, table_rows
from bench.goodput_fleets import NUM_CONFIGS, configurations, fleet
from bench.goodput_loads import LOADS, at_rate, half_windows, overlaid
from bench.goodput_search import Probe, RateSearch, Trial, best_of, tune
from simulator.baselines.catalog import POLICIES
from simulator.traces.readers import read_trace
from simulator.traces.trace import plain_request


def test_the_search_closes_in_on_the_rate_where_attainment_falls_below_the_share():
    asked: list[float] = []

    def measure_share(rate: float) -> float:
        asked.append(rate)
        return 1.0 if rate <= 50.0 else 0.5

    found = RateSearch(measure_share).highest(0.9, guess=10.0, budget=12)
    assert len(asked) == 12
    assert 0.99 * 50 < found <= 50


def test_a_share_that_is_just_reached_passes():
    search = RateSearch(lambda rate: 0.9 if rate <= 10.0 else 0.899)
    assert search.highest(0.9, guess=10.0, budget=1) == 10.0


def test_a_guess_that_is_too_high_is_left_downwards_and_nothing_found_is_zero():
    assert 0 < RateSearch(lambda rate: float(rate <= 1.0)).highest(0.9, guess=8.0, budget=10) <= 1.0
    assert RateSearch(lambda rate: 0.0).highest(0.9, guess=8.0, budget=4) == 0.0


def test_luck_beyond_a_failure_does_not_count():
    search = RateSearch(lambda rate: 1.0)
    search.probes = [Probe(10.0, 0.95), Probe(12.0, 0.85), Probe(14.0, 0.93)]
    assert search.highest(0.9, guess=1.0, budget=0) == 10.0


def test_a_stricter_search_begins_with_what_the_laxer_one_knows():
    search = RateSearch(lambda rate: 1.0 - rate / 100)
    lax = search.highest(0.9, guess=8.0, budget=6)
    strict = search.highest(0.99, guess=8.0, budget=6)
    assert (len(search.probes), 9.0 < lax <= 10.0, 0.8 < strict <= 1.0) == (12, True, True)


@pytest.mark.parametrize("capacities", [[5.0, 20.0, 10.0], [0.0, 0.0, 0.0], [100.0, 100.0, 90.0]])
def test_tuning_spends_its_budget_whatever_it_finds(capacities: list[float]):
    trials = tune(3, lambda number, rate: float(rate <= capacities[number]), 8.0, 0.9, budget=10)
    assert len(trials) == 10
    assert best_of(trials, 0.9) == {20.0: 1, 0.0: 0, 100.0: 0}[capacities[1]]


def test_of_configurations_that_fail_at_the_next_rate_the_better_one_is_taken():
    trials = [
        Trial(0, 0, Probe(8.0, 0.95)),
        Trial(1, 0, Probe(8.0, 0.99)),
        Trial(1, 1, Probe(10.0, 0.5)),
        Trial(0, 1, Probe(10.0, 0.8)),
    ]
    assert best_of(trials, 0.9) == 0


def test_every_policy_is_tuned_over_equally_many_different_configurations_with_and_without_prefill():
    for policy in POLICIES:
        shapes = configurations(policy)
        assert len(set(shapes)) == NUM_CONFIGS
        assert sum(shape.is_colocated for shape in shapes) == 2


def test_a_fleet_uses_all_its_gpus_and_its_scheduler_knows_the_slo():
    slo = LOADS["code"].slos["llama-3.1-70b"]
    for shape in configurations("dynamo"):
        spec = fleet("llama-3.1-70b", 32, shape, slo)
        num_prefill = spec.prefill.replicas if spec.prefill else 0
        assert 4 * (num_prefill + spec.decode.replicas) == 32
        assert (num_prefill == 0) == shape.is_colocated
        assert (spec.scheduler.itl_slo_s, spec.scheduler.slo.standard.ttft_s) == (slo.tpot_s, slo.ttft_s)


def test_windows_laid_over_one_another_keep_lengths_and_cut_sessions_to_one_window():
    trace = [plain_request(f"r{number}", 3.0 * number, 100 + number, 5, number) for number in range(40)]
    window = overlaid(trace, 10.0, seed=0)
    assert sorted(request.num_prompt_tokens for request in window) == list(range(100, 140))
    assert max(request.arrival_s for request in window) < 10.0
    load = at_rate(window, 10.0, rate=20.0, seed=1)
    assert 150 <= len(load) <= 200
    assert len({request.prompt for request in load}) == len(load)


def write_code_trace(folder: Path) -> None:
    """As Azure's: prompts of 1,000 tokens, twice a second."""
    lines = [f"2023-11-16 18:00:{second:02d}.{half}000000,1000,10" for second in range(60) for half in (0, 5)]
    (folder / "code.csv").write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *lines)) + "\n")


def test_one_cell_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_code_trace(tmp_path)
    small = replace(LOADS["code"], file="code.csv", window_s=2.0, guess_per_gpu={"llama-3.1-8b": 5.0})
    monkeypatch.setitem(LOADS, "code", small)
    cell = Cell("code", "llama-3.1-8b", 2, "baton", False)
    result = measure(cell, tmp_path, Budget(NUM_CONFIGS, (2, 1), (0, 1)))
    assert len(result["trials"]) == NUM_CONFIGS
    assert len(result["probes"]) == 3
    assert result["goodput"][0] >= result["goodput"][1] > 0
    assert json.loads(json.dumps(result)) == result
    (first,) = (shape for shape in configurations("baton") if str(shape) == result["trials"][0][0])
    rate, share = result["trials"][0][1:]
    trace = read_trace(tmp_path / "code.csv")
    windows = [half_windows(trace, small, 131_072, seed)[0] for seed in (0, 1)]
    shares = [good_share(cell, first, window, rate, seed) for seed, window in enumerate(windows)]
    assert share == pytest.approx(sum(shares) / 2), "a probe is the mean over its seeds"


def test_the_table_says_who_beats_us():
    rows = table_rows({"baton": {"goodput": [1.0, 0.5], "tuned": "x"}, "preble": {"goodput": [2.0, 1.0], "tuned": "y"}})
    assert [(row[0], row[4]) for row in rows] == [("preble", "0.50"), ("baton", "1.00")]
