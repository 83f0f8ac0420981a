"""What a benchmark of N clients reads of replicas that compute prompts and others that decode. Pure.

A closed network of two stations, by its bounds: P prefill replicas take one prompt after the other, s seconds each; D
replicas decode, a step of n sequences taking d(n). Of X requests a second that go round

    X = min(P / s, N / (s + outputs * d(n))),  n = X * outputs * d(n) / D,  TTFT = N / X - outputs * d(n),  TPOT = d(n)

In the beginning all prompts come at once and wait for half of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

NUM_ROUNDS = 60  # each halves what n may be off by


@dataclass(frozen=True)
class ApartTimes:
    """Means, in seconds."""

    first_ttft_s: float  # of those that came at once in the beginning
    later_ttft_s: float
    tpot_s: float


def apart_times(
    num_clients: int,
    num_output_tokens: int,
    num_prefill: int,
    num_decode: int,
    prompt_s: float,
    step_s: Callable[[float], float],
) -> ApartTimes:
    """`step_s` of how many sequences decode together, growing with these."""

    def requests_per_s(num_decoding: float) -> float:
        round_s = prompt_s + num_output_tokens * step_s(num_decoding)
        return min(num_prefill / prompt_s, num_clients / round_s)

    low, high = 1.0, max(1.0, num_clients / num_decode)
    for _ in range(NUM_ROUNDS):
        middle = (low + high) / 2
        if requests_per_s(middle) * num_output_tokens * step_s(middle) > middle * num_decode:
            low = middle
        else:
            high = middle
    tpot_s = step_s(high)
    later_s = max(prompt_s, num_clients / requests_per_s(high) - num_output_tokens * tpot_s)
    return ApartTimes(max(1.0, (num_clients / num_prefill + 1) / 2) * prompt_s, later_s, tpot_s)
