"""Tokens of a decode replica on their way to clients: the twin of decode_worker/steps.py. Pure."""

from collections.abc import Callable, Sequence

from decode_worker.handoff import Handoff
from decode_worker.handoffs import Handoffs
from decode_worker.scheduler import DecodeJob, Outcome
from simulator.host import Host
from simulator.peers import Peers

Times = list[float]  # when the client gets each token of an attempt


class DecodeTokens:
    """Tokens of quiet steps are noted all at once, those of others as they come; ingresses hear of what they act on."""

    def __init__(
        self,
        host: Host,
        peers: Peers,
        handoffs: Handoffs,
        end: Callable[[str, int], None],
    ) -> None:
        """`end` takes an attempt out of all books."""
        self._host = host
        self._peers = peers
        self._handoffs = handoffs
        self._end = end
        self._times: dict[tuple[str, int], Times] = {}  # of open attempts
        self._times_of: dict[DecodeJob, Times] = {}
        self.outputs: dict[DecodeJob, Sequence[int]] = {}  # all that the model says to jobs that run, over all attempts
        self._fresh: dict[DecodeJob, Handoff] = {}  # they have no token from here yet

    def opened(self, handoff: Handoff, times: Times) -> None:
        """Where the moments of its tokens go."""
        self._times[handoff.key] = times

    def joined(self, handoff: Handoff) -> None:
        """It waits for its first token from here."""
        assert handoff.job is not None
        self._fresh[handoff.job] = handoff
        self._times_of[handoff.job] = self._times[handoff.key]
        self.outputs[handoff.job] = self._peers.output(handoff.request_id)

    def forget(self, handoff: Handoff) -> None:
        """It is over."""
        self._times.pop(handoff.key, None)
        if handoff.job is not None:
            self._times_of.pop(handoff.job, None)
            self.outputs.pop(handoff.job, None)
            self._fresh.pop(handoff.job, None)

    def tell_resume(self, handoff: Handoff) -> None:
        """Its ingress shall plan the rest anew."""
        ingress = self._peers.ingress(handoff.request_id)
        self._host.world.wire.tell(self._host.number, ingress, ingress.resume, *handoff.key)

    # ---- the engine's side --------------------------------------------------------------------------------------

    def draw(self, job: DecodeJob) -> int:
        """Its next token; it may have been cancelled meanwhile."""
        return self._peers.output(job.request_id)[job.sequence.num_outputs]

    def must_step(self, jobs: Sequence[DecodeJob]) -> bool:
        """The first token of a prompt that was computed here is told to the ingress as it comes: one of these has it
        to come.
        """
        return any(handoff.source is None and job in jobs for job, handoff in self._fresh.items())

    def shown(self, jobs: Sequence[DecodeJob], ends: list[float]) -> None:
        """Quiet steps end at these moments: each of these jobs gets a token at each of them."""
        latency_s = self._host.world.wire.latency_s
        shown = [end + latency_s for end in ends]
        for job in jobs:
            if job in self._fresh:
                self._first_token(job, ends[0] + self._host.clock_offset_s)
            self._times_of[job] += shown

    def deliver(self, outcomes: list[Outcome]) -> None:
        """As DecodeSteps does with a step's outcomes; tokens of quiet steps have been shown already."""
        wire, number = self._host.world.wire, self._host.number
        shown_at = self._host.world.queue.now + wire.latency_s
        for outcome in outcomes:
            job = outcome.job
            handoff = self._handoffs.find(job.request_id, job.attempt)
            if handoff is None:
                continue
            if outcome.token_id is not None:
                self._note(handoff, job, outcome.first_index, shown_at)
            if outcome.finish_reason == "resume":
                self.tell_resume(handoff)
                self._end(*handoff.key)
            elif outcome.finish_reason is not None:
                ingress = self._peers.ingress(job.request_id)
                wire.tell(number, ingress, ingress.finished, *handoff.key, outcome.finish_reason, handoff.phases())
                self._end(*handoff.key)

    def _note(self, handoff: Handoff, job: DecodeJob, index: int, shown_at: float) -> None:
        """`index` among the output tokens of all attempts."""
        times = self._times_of[job]
        if len(times) <= index - handoff.message.sequence.num_forced:
            times.append(shown_at)
        if job not in self._fresh:
            return
        self._first_token(job, self._host.now)
        if handoff.source is None:
            cached = handoff.sequence.num_cached
            self._host.num_prompt_tokens += handoff.sequence.num_prompt
            self._host.num_cached_tokens += cached
            ingress = self._peers.ingress(job.request_id)
            self._host.world.wire.tell(self._host.number, ingress, ingress.first_token_here, *handoff.key, cached)

    def _first_token(self, job: DecodeJob, now: float) -> None:
        self._fresh.pop(job).times.first_token_at = now
