"""What a benchmark reads of one replica whose N clients each send their next request when the last one ended. Pure.

Clients begin together. Nothing but steps passes time, so that which step computes what depends on sizes alone:
`play` finds that out once, and any cost model says what the times are, as sums over the steps

    TTFT = sum over steps of (share of the first requests that wait for their first token) * seconds
    TPOT = sum over steps of (share of the requests that decode, by their outputs) * seconds

Three waves of N requests are played: all first requests come at once, and nothing comes behind the last ones; what is
between them goes on for as long as a benchmark runs, and its figures are averages of these weighted by their numbers.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulator.cost.cost_model import StepWork

TOKEN_BUDGET = 8192  # of a step
NUM_WAVES = 3
GOLDEN = 0.6180339887498949  # multiples of it, less their whole parts, are spread evenly

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LoopShape:
    """What is sent, and how steps are made of it."""

    num_clients: int
    num_prompt_tokens: int
    num_output_tokens: int
    least_size: float = 1.0  # sizes are spread evenly between this share of the above and all of it
    prompts_first: bool = False  # steps compute prompts alone while any waits, instead of beside what decodes


@dataclass(frozen=True)
class LoopStep:
    """`num_steps` alike in a row; `work` is the one in their middle. Weights are shares of requests, see above."""

    work: StepWork
    num_steps: int
    first_ttft: float  # of those that came at once in the beginning
    early_tpot: float  # of all waves but the last
    last_tpot: float


@dataclass(frozen=True)
class LoopTimes:
    """Means, in seconds, or in whatever the steps were measured in."""

    first_ttft: Floats
    early_tpot: Floats
    last_tpot: Floats

    def tpot(self, burst_share: float) -> Floats:
        """`burst_share` is how many of a benchmark's requests came at once in its beginning; as many are the last."""
        return burst_share * self.last_tpot + (1 - burst_share) * self.early_tpot


def loop_times(shape: LoopShape, measure: Callable[[StepWork], Sequence[float]]) -> LoopTimes:
    """Of every step `measure` says a vector, all of one length: its seconds, or terms of them."""
    steps = play(shape)
    measured = np.array([measure(step.work) for step in steps])
    names = ("first_ttft", "early_tpot", "last_tpot")
    return LoopTimes(*(np.array([getattr(step, name) * step.num_steps for step in steps]) @ measured for name in names))


@dataclass
class _Request:
    wave: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed: int = 0  # tokens of the prompt
    num_decoded: int = 0

    @property
    def num_left(self) -> int:
        """Tokens behind the first one."""
        return self.num_output_tokens - 1 - self.num_decoded


@dataclass
class _Loop:
    shape: LoopShape
    waiting: deque[_Request] = field(default_factory=deque)
    decoding: list[_Request] = field(default_factory=list)
    num_sent: int = 0

    def send(self) -> None:
        """One request more, unless all were."""
        shape, number = self.shape, self.num_sent
        if number < NUM_WAVES * shape.num_clients:
            sizes = (shape.least_size + (1 - shape.least_size) * (number * GOLDEN * k % 1) for k in (1, 2))
            prompt, output = (
                max(2, round(size * num))
                for size, num in zip(sizes, (shape.num_prompt_tokens, shape.num_output_tokens), strict=True)
            )
            self.waiting.append(_Request(number // shape.num_clients, prompt, output))
            self.num_sent += 1

    def chunks(self) -> tuple[list[_Request], list[tuple[int, int]]]:
        """Those whose prompts the next step computes, and what of them."""
        budget = TOKEN_BUDGET - (0 if self.shape.prompts_first else len(self.decoding))
        requests, chunks = list[_Request](), list[tuple[int, int]]()
        for request in self.waiting:
            if budget <= 0:
                break
            num = min(budget, request.num_prompt_tokens - request.num_computed)
            requests.append(request)
            chunks.append((num, request.num_computed))
            budget -= num
        return requests, chunks


@lru_cache(maxsize=1024)
def play(shape: LoopShape) -> tuple[LoopStep, ...]:
    """All steps from the first request to the end of the last."""
    loop = _Loop(shape)
    for _ in range(shape.num_clients):
        loop.send()
    return tuple(_steps(loop))


def _steps(loop: _Loop) -> Iterator[LoopStep]:
    while loop.waiting or loop.decoding:
        requests, chunks = loop.chunks()
        stalled = bool(chunks) and loop.shape.prompts_first
        num_steps = 1 if chunks else min(request.num_left for request in loop.decoding)
        yield _weighed(loop, chunks, 0 if stalled else len(loop.decoding), num_steps)
        if not stalled:
            for request in loop.decoding:
                request.num_decoded += num_steps
        for request, (num, _) in zip(requests, chunks, strict=True):
            request.num_computed += num
            if request.num_computed == request.num_prompt_tokens:
                loop.waiting.remove(request)
                loop.decoding.append(request)
        ended = [request for request in loop.decoding if not request.num_left]
        loop.decoding = [request for request in loop.decoding if request.num_left]
        for _ in ended:
            loop.send()


def _weighed(loop: _Loop, chunks: list[tuple[int, int]], num_decoding: int, num_steps: int) -> LoopStep:
    num_kv_tokens = 0
    if num_decoding:
        num_kv_tokens = sum(request.num_prompt_tokens + 1 + request.num_decoded for request in loop.decoding)
        num_kv_tokens += num_decoding * (num_steps - 1) // 2
    num_first = sum(request.wave == 0 for request in loop.waiting)
    shares = [1 / (request.num_output_tokens - 1) for request in loop.decoding if request.wave < NUM_WAVES - 1]
    last = [1 / (request.num_output_tokens - 1) for request in loop.decoding if request.wave == NUM_WAVES - 1]
    num_clients = loop.shape.num_clients
    return LoopStep(
        StepWork(tuple(chunks), num_decoding, num_kv_tokens),
        num_steps,
        num_first / num_clients,
        sum(shares) / (num_clients * (NUM_WAVES - 1)),
        sum(last) / num_clients,
    )
