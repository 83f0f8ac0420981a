"""What a benchmark of N clients reads that each send the next request when one ends: mean TTFT and TPOT. Pure.

Requests are of one shape, their ends are spread out, and prompts join the steps of what decodes:

TPOT = decode step (N, half of the output behind the prompt) + what N - 1 prompts add to steps within one output
TTFT = of the share `burst_share`, who came at once in the beginning: the wait for the prompts before them;
       of the others: half a step, the prompt's own steps, the prompts that happen to come together (M/D/1)
"""

from dataclasses import dataclass

from simulator.cost.cost_model import CostModel, StepWork

TOKEN_BUDGET = 8192  # of a step
MOST_LOAD = 0.95  # of prompts, where the formula of the queue still says something


@dataclass(frozen=True)
class LoopTimes:
    """Seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class LoopTerms:
    """What the times are made of, in seconds."""

    decode_s: float  # a step without prompts
    prompt_s: float  # what a prompt adds to steps
    alone_s: float  # a prompt by itself
    num_clients: int
    num_output_tokens: int
    chunks_per_prompt: float

    @classmethod
    def of(cls, costs: CostModel, num_clients: int, num_prompt_tokens: int, num_output_tokens: int) -> "LoopTerms":
        """Of one shape of requests."""
        context = num_clients * (num_prompt_tokens + num_output_tokens // 2)
        decode_s = costs.step_s(StepWork((), num_clients, context))
        starts = range(0, num_prompt_tokens, TOKEN_BUDGET)
        chunks = [(min(TOKEN_BUDGET, num_prompt_tokens - start), start) for start in starts]
        prompt_s = sum(costs.step_s(StepWork((chunk,), num_clients, context)) - decode_s for chunk in chunks)
        alone_s = sum(costs.step_s(StepWork((chunk,))) for chunk in chunks)
        share = num_prompt_tokens / TOKEN_BUDGET
        return cls(decode_s, prompt_s, alone_s, num_clients, num_output_tokens, share)

    @property
    def tpot_s(self) -> float:
        """See above."""
        return self.decode_s + (self.num_clients - 1) / self.num_output_tokens * self.prompt_s

    @property
    def burst_s(self) -> float:
        """Mean TTFT of prompts that come at once."""
        mean_before = (self.num_clients + 1) / 2
        return self.prompt_s * max(mean_before, min(self.num_clients, 1 / self.chunks_per_prompt)) + self.decode_s

    @property
    def steady_s(self) -> float:
        """Mean TTFT of prompts that come one by one."""
        load = self.num_clients * self.prompt_s / (self.num_output_tokens * self.tpot_s + self.prompt_s)
        load = min(MOST_LOAD, load)
        queue_s = load * self.prompt_s / (2 * (1 - load))
        return self.alone_s + (self.decode_s + self.tpot_s) / 2 + queue_s

    def times(self, burst_share: float, request_s: float) -> LoopTimes:
        """`request_s` is what a request takes on its way in and out."""
        ttft_s = burst_share * self.burst_s + (1 - burst_share) * self.steady_s + request_s
        return LoopTimes(ttft_s, self.tpot_s)
