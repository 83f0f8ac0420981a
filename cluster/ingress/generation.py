"""The seam between HTTP and the fleet: a generation asked for in tokens, and the events that answer it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from core.messages.to_decode import Phases
from core.messages.to_scheduler import Decisions, FleetStatus, Traffic
from core.sampling import SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Standing:
    """Who asks, and what that one expects."""

    tenant: str = ""
    slo_class: str = "standard"
    ttft_slo_s: float = 0.0  # 0: that of the class
    itl_slo_s: float = 0.0
    priority: int = 0


@dataclass(frozen=True)
class Generation:
    """One sequence to generate. `request_id` is unique per choice of an HTTP request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    timeout_s: float
    placement: str = "auto"  # "pair" or "local" when the client insists
    standing: Standing = Standing()


@dataclass(frozen=True)
class GenerationReport:
    """Where the last attempt ran and where the time went, for those who ask."""

    placement: str  # why there: see core.messages.to_scheduler.Plan.reason
    prefill: str | None  # replica ids
    decode: str
    num_resumes: int
    phases: Phases | None


@dataclass(frozen=True)
class GenerationEvent:
    """New output tokens, in order and without repetition. The last event has a finish_reason: "stop" or "length".

    A stop token that ended the output is the last of `token_ids`. `logprobs` is empty or as long as `token_ids`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    num_cached_tokens: int | None = None  # of the prompt; with the first event
    phases: Phases | None = None  # once, when known
    num_resumes: int = 0  # times that the request was planned anew so far
    report: GenerationReport | None = None  # with the last event


@dataclass(frozen=True)
class FleetHealth:
    """`ready`: a request can be answered. `degraded` names what is missing though (empty: nothing).

    `max_model_len` is the longest sequence that some decode replica's KV cache holds, None while none is known.
    """

    ready: bool
    degraded: str = ""
    max_model_len: int | None = None


class Backend(Protocol):
    """What answers generations: the orchestrator in production, an in-process echo in tests of the HTTP layer."""

    def generate(self, generation: Generation) -> AsyncIterator[GenerationEvent]:
        """An async generator; closing it early cancels the request everywhere. Raises BatonError."""
        ...

    async def health(self) -> FleetHealth:
        """Answers at once, from the last known state."""
        ...

    async def fleet(self) -> FleetStatus:
        """Replicas, their load and links. Raises PeerLost while nobody knows."""
        ...

    async def set_traffic(self, weights: dict[str, float] | None) -> Traffic:
        """Shares requests out between generations; None: as before the last change. Raises InvalidParameter."""
        ...

    async def why(self, request_id: str) -> Decisions:
        """What was decided about a request, as long as that is remembered. Raises PeerLost while nobody knows."""
        ...
