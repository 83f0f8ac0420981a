"""Loads of the goodput benchmark: which traces, inside which SLOs, and how a trace becomes a load of any rate. Pure.

    trace -> half -> the windows of `window_s` seconds that the half consists of, laid over one another; of a session
          that reaches through several of them one is drawn -> `scale`: as many independent sessions as the rate asks

So sessions of all lengths are in a load, none is played twice with the same tokens, gaps within a session stay, and
what different sessions share stays shared. Bursts of the whole trace are averaged out, as those of many independent
streams are. A session that is cut in two begins its later part with a cold cache.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from simulator.traces.scaling import halves, scale
from simulator.traces.trace import TracedRequest


@dataclass(frozen=True)
class Slo:
    """Seconds until the first token, and of each further one on average; where that is from."""

    ttft_s: float
    tpot_s: float
    source: str


@dataclass(frozen=True)
class Load:
    """A trace in the benchmark."""

    file: str
    slos: dict[str, Slo]  # by model
    window_s: float
    guess_per_gpu: dict[str, float]  # requests per second where the searches begin, by model
    starts_until_s: float | None = None  # of a trace whose sessions begin until then: what comes after is their ebb


MLPERF = "MLPerf Inference 5.1, interactive: Llama 3.1 8B 0.5 s and 30 ms, Llama 2 70B 0.45 s and 40 ms"
MOONCAKE = "Mooncake (FAST 2025): 30 s and 0.1 s for a 70B model; the first in proportion to parameters for 8B"
SUMMARIES = "DistServe (OSDI 2024), summarisation, its workload of long prompts: 15 s and 0.15 s"
CODE = "DistServe, code completion, 0.125 s and 0.2 s, the first times 4: these prompts are that much longer"

LOADS = {
    "conversation": Load(
        "mooncake_conversation_first30min.jsonl.gz",
        {"llama-3.1-8b": Slo(3.4, 0.1, MOONCAKE), "llama-3.1-70b": Slo(30.0, 0.1, MOONCAKE)},
        60.0,
        {"llama-3.1-8b": 1.2, "llama-3.1-70b": 0.15},
    ),
    "code": Load(
        "azure2023_code.csv.gz",
        {"llama-3.1-8b": Slo(0.5, 0.2, CODE), "llama-3.1-70b": Slo(1.0, 0.2, CODE)},
        6.0,
        {"llama-3.1-8b": 20.0, "llama-3.1-70b": 2.0},
    ),
    "servegen": Load(
        "servegen_deepseek-r1_sampled_peak1h.csv.gz",
        {"llama-3.1-8b": Slo(0.5, 0.03, MLPERF), "llama-3.1-70b": Slo(0.45, 0.04, MLPERF)},
        15.0,
        {"llama-3.1-8b": 16.0, "llama-3.1-70b": 2.4},
    ),
    "agentic": Load(
        "agentic_claude_code_sessions_A.jsonl.gz",
        {"llama-3.1-8b": Slo(15.0, 0.15, SUMMARIES), "llama-3.1-70b": Slo(15.0, 0.15, SUMMARIES)},
        240.0,
        {"llama-3.1-8b": 0.2, "llama-3.1-70b": 0.045},
        starts_until_s=9000.0,
    ),
}


def half_windows(
    trace: Sequence[TracedRequest], load: Load, max_model_len: int, seed: int
) -> tuple[list[TracedRequest], list[TracedRequest]]:
    """What to tune on, and what to score on. Requests longer than the model are left out."""
    until_s = load.starts_until_s
    fitting = [
        request
        for request in trace
        if request.num_prompt_tokens + request.num_output_tokens < max_model_len
        and (until_s is None or request.arrival_s <= until_s)
    ]
    first, second = halves(fitting)
    return overlaid(first, load.window_s, seed), overlaid(second, load.window_s, seed)


def overlaid(trace: Sequence[TracedRequest], window_s: float, seed: int) -> list[TracedRequest]:
    """The trace's windows as one, of each session the part in one window, drawn by the requests there."""
    random, sessions = Random(seed), defaultdict[str, list[TracedRequest]](list)
    for request in trace:
        sessions[request.session or request.request_id].append(request)
    found = []
    for session in sessions.values():
        number = int(random.choice(session).arrival_s // window_s)
        found += [
            replace(request, arrival_s=request.arrival_s - number * window_s)
            for request in session
            if request.arrival_s // window_s == number
        ]
    return sorted(found, key=lambda request: (request.arrival_s, request.request_id))


def at_rate(window: Sequence[TracedRequest], window_s: float, rate: float, seed: int) -> list[TracedRequest]:
    """A load of about so many arrivals per second, of sessions of the window. Raises ValueError for a rate of 0."""
    return scale(window, rate * window_s / len(window), seed)
