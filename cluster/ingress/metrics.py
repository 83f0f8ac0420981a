"""What an operator sees: latencies with their phases apart, tokens, statuses. One registry per application."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.ingress.generation import GenerationEvent

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)


class Metrics:
    """All metrics of one ingress process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.ttft_s = Histogram(
            "baton_time_to_first_token_seconds",
            "From the HTTP request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.itl_s = Histogram(
            "baton_inter_token_seconds",
            "Time per token between one arrival of a choice's tokens and the next.",
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self.request_s = Histogram(
            "baton_request_seconds",
            "From the HTTP request to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.phase_s = Histogram(
            "baton_phase_seconds",
            "Parts of the time before the first decoded token.",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.requests = Counter(
            "baton_requests", "Answers by status; 499: the client left.", ["endpoint", "status"], registry=registry
        )
        self.prompt_tokens = Counter("baton_prompt_tokens", "Tokens of prompts that were answered.", registry=registry)
        self.cached_tokens = Counter(
            "baton_cached_prompt_tokens", "Of those, tokens found in a prefix cache.", registry=registry
        )
        self.output_tokens = Counter("baton_output_tokens", "Tokens generated.", registry=registry)
        self.resumes = Counter("baton_resumes", "Times that a request was planned anew.", registry=registry)
        self.transfer_bytes = Counter("baton_transfer_bytes", "KV bytes moved before first tokens.", registry=registry)
        self.running = Gauge("baton_running_generations", "Choices being generated.", registry=registry)

    def exposition(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestMeter:
    """Observes one HTTP request; `started` is on the clock of `time.perf_counter`."""

    def __init__(self, metrics: Metrics, started: float) -> None:
        self._metrics = metrics
        self._started = started
        self._has_first = False

    def choice(self) -> "GenerationMeter":
        """A meter for one choice of the request."""
        return GenerationMeter(self._metrics, self)

    def first_token(self, now: float) -> None:
        """Counts the first token of the request's first choice to have one."""
        if not self._has_first:
            self._has_first = True
            self._metrics.ttft_s.observe(now - self._started)


class GenerationMeter:
    """Observes one choice."""

    def __init__(self, metrics: Metrics, request: RequestMeter) -> None:
        self._metrics = metrics
        self._request = request
        self._last: float | None = None
        self._num_resumes = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the choice as running."""
        self._metrics.running.inc()
        try:
            yield
        finally:
            self._metrics.running.dec()

    def observe(self, event: GenerationEvent, num_tokens: int, num_prompt_tokens: int) -> None:
        """Takes an event of which the answer uses `num_tokens` tokens."""
        metrics = self._metrics
        if num_tokens:
            now = time.perf_counter()
            if self._last is None:
                self._request.first_token(now)
                metrics.prompt_tokens.inc(num_prompt_tokens)
            else:
                metrics.itl_s.observe((now - self._last) / num_tokens)
            self._last = now
            metrics.output_tokens.inc(num_tokens)
        if event.num_cached_tokens:
            metrics.cached_tokens.inc(event.num_cached_tokens)
        if event.num_resumes > self._num_resumes:
            metrics.resumes.inc(event.num_resumes - self._num_resumes)
            self._num_resumes = event.num_resumes
        if event.phases is not None:
            phases = event.phases
            for phase, seconds in (
                ("queue", phases.queue_s),
                ("prefill", phases.prefill_s),
                ("transfer", phases.transfer_s),
                ("fetching", phases.fetching_s),
                ("exposed_transfer", phases.exposed_transfer_s),
                ("first_decode", phases.first_decode_s),
            ):
                metrics.phase_s.labels(phase).observe(seconds)
            metrics.transfer_bytes.inc(phases.transfer_bytes)
