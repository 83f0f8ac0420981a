"""A load drawn from clients' rates and lengths has the statistics that the files tell."""

import gzip
import json
from collections import Counter
from itertools import pairwise
from random import Random
from statistics import fmean, pstdev

import pytest

from core.errors import ConfigurationError
from simulator.traces.client_mixes import WINDOW_S, Rate, arrivals
from simulator.traces.readers import read_trace

HEAD = "t_s,client,rate_rps,cv,pattern,shape,scale\n"
# Client 7 asks in two windows with an empty one between them, client 8 in the second alone; scales are those of a fit
# to gaps within bursts, and do not tell the rate.
RATES = HEAD + "1200,7,4.0,1.6,Gamma,0.4,0.1\n2400,7,1.0,1.0,Gamma,1.0,9.9\n1800,8,2.0,2.2,Weibull,0.5,0.2\n"
LENGTHS = [
    {"client": 7, "t_s": 0, "input_tokens": [[10, 20], [0.25, 0.75]], "output_tokens": [[5], [1.0]]},
    {"client": 7, "t_s": 2100, "input_tokens": [[1000], [0.3]], "output_tokens": [[6, 8], [2, 2]]},
    {"client": 8, "t_s": 21600, "input_tokens": [[77], [1]], "output_tokens": [[0], [1]]},
]


def write(folder, rates=RATES, lengths=LENGTHS):
    path = folder / "x_client_rates.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write(rates)
    (folder / "x_client_length_pdfs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lengths))
    return path


def test_clients_ask_in_their_windows_at_their_rates(tmp_path):
    path = write(tmp_path)
    drawn = [request for seed in range(30) for request in read_trace(path, seed=seed)]
    windows = Counter((request.tenant, request.arrival_s // WINDOW_S) for request in drawn)
    assert set(windows) == {("7", 0), ("8", 1), ("7", 2)}
    per_s = {window: number / 30 / WINDOW_S for window, number in windows.items()}
    assert per_s["7", 0] == pytest.approx(4.0, rel=0.03)
    assert per_s["8", 1] == pytest.approx(2.0, rel=0.05)
    assert per_s["7", 2] == pytest.approx(1.0, rel=0.03)
    assert read_trace(path, seed=3) == read_trace(path, seed=3) != read_trace(path, seed=4)


def test_lengths_are_those_of_the_client_at_the_time(tmp_path):
    drawn = [request for seed in range(5) for request in read_trace(write(tmp_path), seed=seed)]
    early = [r for r in drawn if r.tenant == "7" and r.arrival_s < WINDOW_S]
    inputs = Counter(request.num_prompt_tokens for request in early)
    assert set(inputs) == {10, 20} and inputs[20] / len(early) == pytest.approx(0.75, abs=0.02)
    assert {request.num_output_tokens for request in early} == {5}
    late = [r for r in drawn if r.tenant == "7" and r.arrival_s > WINDOW_S]  # from 2400 s of the file on
    assert {request.num_prompt_tokens for request in late} == {1000}
    assert fmean(request.num_output_tokens for request in late) == pytest.approx(7, abs=0.1)  # shares of 2 and 2
    other = [r for r in drawn if r.tenant == "8"]  # asks before its histograms begin
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in other} == {(77, 1)}


@pytest.mark.parametrize(
    ("pattern", "shape", "cv"),
    [("Gamma", 0.05, 4.47), ("Gamma", 1.0, 1.0), ("Gamma", 4.0, 0.5), ("Weibull", 0.5, 2.236), ("Weibull", 2.0, 0.523)],
)
def test_gaps_have_the_spread_of_their_shape_and_bursts_add_nothing_to_the_rate(pattern, shape, cv):
    """Coefficients of variation: 1/sqrt(k) of Gamma; of Weibull Gamma(1 + 2/k)/Gamma(1 + 1/k)^2 = 1 + cv^2."""
    random, rate = Random(5), Rate(0.0, "c", 0.5, pattern, shape)
    windows = [list(arrivals(rate, random)) for _ in range(4000)]
    numbers = [len(window) for window in windows]
    error = pstdev(numbers) / len(numbers) ** 0.5
    assert fmean(numbers) == pytest.approx(300, abs=4 * error) and error < 2
    assert all(window[0] >= 0 and window[-1] < WINDOW_S for window in windows if window)
    assert fmean(fmean(window) for window in windows if window) == pytest.approx(300, abs=10)  # at any time of it
    # A window cuts the longest gaps off: its spread is known where it holds many.
    often = Rate(0.0, "c", 50.0, pattern, shape)
    gaps = [later - earlier for _ in range(8) for earlier, later in pairwise(arrivals(often, random))]
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rates": HEAD + "0,9,1.0,1,Gamma,1,1\n"}, "client '9' has a rate and no lengths"),
        ({"rates": HEAD + "0,7,1.0,1,Pareto,1,1\n"}, "line 2: pattern: .*'Gamma' or 'Weibull'"),
        ({"rates": HEAD + "0,7,nan,1,Gamma,1,1\n"}, "line 2: rate_rps: .* finite"),
        ({"rates": HEAD + "0,7,1.0,1,Gamma,0,1\n"}, "line 2: shape: .* greater than or equal to 0.01"),
        ({"rates": HEAD + "0,7,1e9,1,Gamma,1,1\n"}, "600000000000 requests are to be expected; at most 10000000"),
        ({"lengths": [LENGTHS[0] | {"output_tokens": [[1, 2], [1.0]]}]}, "has 2 lengths and 1 shares"),
        ({"lengths": [LENGTHS[0] | {"output_tokens": [[1], [0]]}]}, "or only shares of 0"),
        ({"lengths": [{"client": 7}]}, "x_client_length_pdfs.jsonl line 1: t_s: Field required"),
    ],
)
def test_statistics_that_cannot_be_are_named(tmp_path, changes, problem):
    with pytest.raises(ConfigurationError, match=f"is not of kind 'clients': ValueError .*{problem}"):
        read_trace(write(tmp_path, **changes))


def test_rates_without_lengths_beside_them_are_no_load(tmp_path):
    path = write(tmp_path)
    (tmp_path / "x_client_length_pdfs.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"rates\.csv\.gz lacks .*: .*x_client_length_pdfs\.jsonl\.gz$"):
        read_trace(path)
    named_otherwise = path.rename(tmp_path / "mix.csv.gz")
    with pytest.raises(ConfigurationError, match=r"lacks the file of its clients' lengths: no client_rates\.csv in"):
        read_trace(named_otherwise)


@pytest.mark.parametrize("kind", ["auto", "servegen"])
def test_a_file_that_is_no_trace_by_itself_says_what_it_is_for(tmp_path, kind):
    total = tmp_path / "total_rate.csv"
    total.write_text("t_s,total_rate_rps\n0,14.8\n600,18.4\n")
    with pytest.raises(
        ConfigurationError, match=r"total_rate\.csv is no trace by itself: .*bench\.autoscaling --rates"
    ):
        read_trace(total, kind)
    write(tmp_path)
    with pytest.raises(ConfigurationError, match=r"pdfs\.jsonl is no trace by itself: .* name the client_rates\.csv"):
        read_trace(tmp_path / "x_client_length_pdfs.jsonl", kind)
