"""A request of a trace. Tokens are known by identity alone: equal prefixes of two prompts are equal runs. Pure."""

from dataclasses import dataclass
from itertools import chain, repeat

Run = tuple[int, int]  # a token id, below 2**31, and how many times it stands there


@dataclass(frozen=True)
class TracedRequest:
    """One arrival. `output` is what the model will say, so that a session's next prompt may begin with it."""

    request_id: str
    arrival_s: float  # since the trace began
    prompt: tuple[Run, ...]
    output: tuple[Run, ...]
    tenant: str = ""
    session: str = ""  # requests of one conversation or agent; empty: unknown

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(count for _, count in self.prompt)

    @property
    def num_output_tokens(self) -> int:
        """Tokens until the request ends, at least one."""
        return sum(count for _, count in self.output)


def expand(runs: tuple[Run, ...]) -> tuple[int, ...]:
    """The token ids that runs stand for."""
    return tuple(chain.from_iterable(repeat(token, count) for token, count in runs))
