"""A load drawn from what is known of each client: how often it asked, window by window, and how long. Pure.

So ServeGen (arXiv:2505.09999) describes production loads: gaps between a client's requests follow a Gamma or Weibull
distribution that is fitted to each window, lengths the client's own histograms, prompts and answers independent.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gamma
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from simulator.traces.scaling import MOST_REQUESTS
from simulator.traces.trace import MOST_TOKENS, TracedRequest, plain_request

WINDOW_S = 600.0  # that each rate holds for

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Lengths = list[Annotated[int, Field(ge=0, le=MOST_TOKENS)]]
Shares = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]


@dataclass(frozen=True, slots=True)
class Rate:
    """A client's in the window that begins at `t_s`; guarded by pydantic where it is read."""

    t_s: Seconds
    client: str
    rate_rps: Seconds
    pattern: Literal["Gamma", "Weibull"]
    shape: Annotated[float, Field(ge=0.01, le=1000)]


@dataclass(frozen=True, slots=True)
class Histograms:
    """A client's from `t_s` on: lengths, and the share of requests that has each. Guarded as a rate is."""

    t_s: Seconds
    client: int | str
    input_tokens: tuple[Lengths, Shares]
    output_tokens: tuple[Lengths, Shares]


def draw_clients(rates: Sequence[Rate], histograms: Sequence[Histograms], random: Random) -> list[TracedRequest]:
    """All windows, the first one at 0 s, clients as tenants. Raises ValueError for what no load can be drawn from."""
    expected = sum(rate.rate_rps for rate in rates) * WINDOW_S
    if expected > MOST_REQUESTS:
        raise ValueError(f"{expected:.0f} requests are to be expected; at most {MOST_REQUESTS} are allowed")
    lengths = _Lengths(histograms)
    first_s = min((rate.t_s for rate in rates), default=0.0)
    drawn: list[TracedRequest] = []
    for rate in rates:
        for after_s in arrivals(rate, random):
            arrival_s = rate.t_s - first_s + after_s
            num_tokens = lengths.draw(rate.client, rate.t_s + after_s, random)
            number = len(drawn)
            drawn.append(plain_request(f"clients-{number}", arrival_s, *num_tokens, number, tenant=rate.client))
    return drawn


def arrivals(rate: Rate, random: Random) -> Iterator[float]:
    """Seconds into a window, of gaps whose mean is that of the rate, whatever the mean of the fit.

    The window begins at any moment of the process, not with an arrival: the rest of the gap under way is an even share
    of a gap that is drawn by its length (Cox, Renewal Theory, 1962, ch. 5). Otherwise bursts would add to the rate.
    """
    if rate.rate_rps == 0:
        return
    shape = rate.shape
    if rate.pattern == "Gamma":
        scale = 1 / (rate.rate_rps * shape)
        after_s = random.random() * random.gammavariate(shape + 1, scale)
    else:
        scale = 1 / (rate.rate_rps * gamma(1 + 1 / shape))
        after_s = random.random() * scale * random.gammavariate(1 + 1 / shape, 1.0) ** (1 / shape)
    while after_s < WINDOW_S:
        yield after_s
        is_gamma = rate.pattern == "Gamma"
        after_s += random.gammavariate(shape, scale) if is_gamma else random.weibullvariate(scale, shape)


class _Lengths:
    """Of all clients, by when they hold."""

    def __init__(self, histograms: Sequence[Histograms]) -> None:
        self._since: defaultdict[str, list[float]] = defaultdict(list)
        self._tables: defaultdict[str, list[tuple[_Table, _Table]]] = defaultdict(list)
        for one in sorted(histograms, key=lambda one: one.t_s):
            client = str(one.client)
            self._since[client].append(one.t_s)
            self._tables[client].append((_Table(client, *one.input_tokens), _Table(client, *one.output_tokens)))

    def draw(self, client: str, at_s: float, random: Random) -> tuple[int, int]:
        """Prompt and answer, by the last histograms that began before, else the first. Raises ValueError."""
        if client not in self._tables:
            raise ValueError(f"client {client!r} has a rate and no lengths")
        place = max(0, bisect_right(self._since[client], at_s) - 1)
        prompt, answer = self._tables[client][place]
        return max(1, prompt.draw(random)), max(1, answer.draw(random))


class _Table:
    """A histogram to draw from."""

    def __init__(self, client: str, lengths: Lengths, shares: Shares) -> None:
        self._lengths, self._until = lengths, list(accumulate(shares))
        if len(lengths) != len(shares) or not sum(shares) > 0:
            raise ValueError(
                f"client {client!r} has {len(lengths)} lengths and {len(shares)} shares, or only shares of 0"
            )

    def draw(self, random: Random) -> int:
        return random.choices(self._lengths, cum_weights=self._until)[0]
