"""How the next token of a request is chosen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one sequence; validated at the HTTP edge.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. `seed` and the absolute position
    of a token are the only inputs of its random number, so a resumed or re-batched request continues alike.
    `stop_token_ids` holds the end-of-sequence tokens too, unless the request ignores them.
    `num_logprobs` is None for no logprobs, 0 for the chosen token's alone, k for the k best as well.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0  # 0 <= seed < 2**63
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability (natural log, of the unscaled distribution) of a sampled token, and the best alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first
