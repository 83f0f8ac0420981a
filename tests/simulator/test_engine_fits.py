"""Overheads of engines out of measured runs, and runs out of a table whose rows tell some things wrongly."""

import csv
import gzip
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from simulator.cost.campaigns import Campaign, fit_campaign, held_out_errors, shape_halves, ttft_errors
from simulator.cost.fit_engines import as_weights, fit_overhead, loop_terms
from simulator.cost.gpu_cost_model import EngineOverhead
from simulator.cost.least_squares import not_negative
from simulator.cost.measured_runs import MeasuredRun, PrefillSide, Split, read_runs
from simulator.cost.run_times import AggregatedTimes, DisaggregatedTimes

RANKS = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
COLUMNS = (
    *("silicon_data_source", "backend", "backend_version", "model_path", "system", "mode", "isl", "osl"),
    *("gemm_quant_mode", "batch_size", "prefill_num_workers", "decode_num_workers", "decode_batch_size"),
    *(side + name for side in ("", "prefill_", "decode_") for name in RANKS),
    *("silicon_ttft_ms", "silicon_tpot_ms"),
)
TRUE = EngineOverhead(1.5e-3, 4e-5)


CAMPAIGN = Campaign(burst_share=0.25, num_prompts=1.5, num_without_place=1.0, request_s=0.02, client_s=1e-3)


def runs_of(overhead: EngineOverhead, campaign: Campaign = CAMPAIGN) -> list[MeasuredRun]:
    shapes = [(ranks, clients, 1000, 100 + 25 * clients) for ranks in (1, 2, 4) for clients in (1, 4, 16, 64)]
    runs = []
    for ranks, clients, prompt, output in shapes:
        run = MeasuredRun(
            "llama-3.1-8b", "h100", "vllm", "fp8", Split(ranks), clients, prompt, output, 1.0, 1.0, is_public=True
        )
        times, weights = AggregatedTimes(run), as_weights(overhead)
        ttft_s = sum(number * term for number, term in zip(campaign, times.ttft_terms(weights), strict=True))
        runs.append(replace(run, ttft_s=ttft_s, tpot_s=times.tpot_s(weights)))
    return runs


def test_overhead_is_found_again_though_a_third_of_the_runs_say_something_else():
    runs = runs_of(TRUE)
    strange = [replace(run, tpot_s=run.tpot_s * factor) for run, factor in zip(runs[::2], (0.2, 3.0) * 3, strict=True)]
    runs += strange
    found = fit_overhead(runs, [loop_terms(run) for run in runs])
    assert found.step_s == pytest.approx(TRUE.step_s, rel=0.03)
    assert found.sequence_s == pytest.approx(TRUE.sequence_s, rel=0.03)


def test_a_campaign_is_found_again_though_some_runs_say_something_else():
    runs, weights = runs_of(TRUE), as_weights(TRUE)
    runs[5] = replace(runs[5], ttft_s=9.0)
    campaign = fit_campaign([AggregatedTimes(run) for run in runs], weights)
    assert campaign == pytest.approx(CAMPAIGN, rel=0.1)
    others = [AggregatedTimes(run) for run in runs[:5] + runs[6:]]
    assert np.max(np.abs(ttft_errors(others, weights, campaign))) < 0.03


def test_a_campaign_is_checked_on_shapes_of_load_that_it_was_not_fitted_to():
    times = [AggregatedTimes(run) for run in runs_of(TRUE)]
    halves = shape_halves(times)
    assert [{one.run.num_clients for one in half} for half in halves] == [{1, 16}, {4, 64}]
    assert len(held_out_errors(times, as_weights(TRUE))) == len(times)
    assert held_out_errors([one for one in times if one.run.num_clients == 4], as_weights(TRUE)) == []


def test_columns_that_would_be_negative_are_left_out_even_all_of_them():
    matrix, target = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0])
    assert not_negative(matrix, target).tolist() == pytest.approx([2.0, 0.0])
    assert not_negative(matrix, -np.ones(3)).tolist() == [0.0, 0.0]


def table(tmp_path, *rows: dict[str, str]):
    path = tmp_path / "silicon_e2e.csv.gz"
    told = {"system": "h200_sxm", "isl": "1024", "osl": "512", "silicon_ttft_ms": "200.5", "silicon_tpot_ms": "9.5"}
    with gzip.open(path, "wt") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([told | row for row in rows])
    return path


DEEPSEEK = {"model_path": "deepseek-ai/DeepSeek-R1", "backend": "trtllm", "gemm_quant_mode": "fp8", "mode": "agg"}


@pytest.mark.parametrize(
    ("source", "ranks", "split"),
    [
        ("source_file=2026-03-25.csv", ("8.0", "1.0", "1.0", "8.0"), Split(8, 8, 1)),
        ("source_file=2026-04-06.csv", ("64.0", "1.0", "8.0", "8.0"), Split(8, 8, 1)),
        ("db-dump/2026-04-27", ("1.0", "64.0", "8.0", "8.0"), Split(1, 8, 8)),
        ("source_file=Qwen.csv", ("1.0", "", "2.0", "1.0"), Split(1, 1, 2)),
        ("source_file=Qwen.csv", ("4.0", "", "2.0", "2.0"), Split(4, 2, 1)),
        ("source_file=Qwen.csv", ("2.0", "", "1.0", "0.0"), Split(2, 1, 1)),
    ],
)
def test_ranks_are_read_as_they_were(tmp_path, source, ranks, split):
    row = DEEPSEEK | {"silicon_data_source": source, "batch_size": "4.0"} | dict(zip(RANKS, ranks, strict=True))
    (run,) = read_runs(table(tmp_path, row), Counter())
    assert run.split == split
    assert run.precision == "fp8_block"  # as the model was published
    assert (run.ttft_s, run.tpot_s, run.num_clients) == (0.2005, 0.0095, 4)


def test_clients_are_those_of_all_ranks_where_a_row_tells_both(tmp_path):
    row = DEEPSEEK | {"silicon_data_source": "x; silicon_concurrency=160", "batch_size": "40.0", "tp_size": "4.0"}
    (run,) = read_runs(table(tmp_path, row), Counter())
    assert run.num_clients == 160


def test_disaggregated_runs_take_the_number_of_replicas_from_the_row_that_tells_it(tmp_path):
    ranks = {"tp_size": "16.0", "attention_dp_size": "1.0", "moe_tp_size": "1.0", "moe_ep_size": "16.0"}
    sides = {side + name: value for side in ("prefill_", "decode_") for name, value in ranks.items()}
    row = DEEPSEEK | {"mode": "disagg", "silicon_data_source": "source_file=2026-03-25.csv; silicon_concurrency=30"}
    silent, telling = row | sides, row | sides | {"prefill_num_workers": "1.0", "decode_num_workers": "3.0"}
    left_out: Counter[str] = Counter()
    runs = list(read_runs(table(tmp_path, silent, telling, silent | {"silicon_tpot_ms": "7.0"}), left_out))
    assert [run.prefill for run in runs] == [PrefillSide(Split(16, 16), 1, 3)] * 2
    assert {(run.split, run.num_clients) for run in runs} == {(Split(16, 16), 30)}
    assert sum(left_out.values()) == 1


def test_a_disaggregated_replica_decodes_without_the_prompts_that_others_compute():
    together = MeasuredRun("llama-3.1-8b", "h100", "vllm", "fp8", Split(1), 16, 4000, 500, 1.0, 1.0, is_public=False)
    apart = DisaggregatedTimes(replace(together, prefill=PrefillSide(Split(1), 4, 1))).apart(as_weights(TRUE))
    tpot_s = float(loop_terms(together).tpot(0.0) @ as_weights(TRUE))
    prompt_s = apart.later_ttft_s
    assert apart.tpot_s + 15 / 500 * prompt_s == pytest.approx(tpot_s, rel=0.1)
