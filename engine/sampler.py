"""Draws tokens by the Gumbel-max trick over a counter-based random number (Gumbel 1954; Maddison et al. 2014).

token = argmax_i (logit_i / temperature - log E_i) with E_i ~ Exp(1) is a sample of softmax(logits / temperature).
E_i = -log(u_i), and u_i is a hash of (seed, absolute position of the drawn token, i) alone: a request draws the same
tokens whatever it is batched with, wherever it runs, and however often it was interrupted.

    key = mix(mix(seed) + position)        per row, 64-bit integers
    u_i = top 23 bits of mix(key + (i + 1) * golden ratio), plus one half

`mix` is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), so a row of u is that generator's output stream from
state `key`. Integer arithmetic wraps alike on CPU and CUDA.
Shapes: N rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.sampling import TokenLogprobs
from engine.step_inputs import DrawAt, device_tensor, int_tensor

_LEAST_TEMPERATURE = 1e-6  # below it the best logit wins anyway, and dividing by it would leave float32's range
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Drawn:
    """Sampler output on the device; `logprobs` covers only `logprob_rows`."""

    token_ids: Tensor  # [N] int64
    logprob_rows: tuple[int, ...] = ()
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None  # chosen [R], best [R, k], ids of the best [R, k]

    def tensors(self) -> tuple[Tensor, ...]:
        """All that has to reach the host."""
        return (self.token_ids, *(self.logprobs or ()))


def room_for_drawn(draws: Sequence[DrawAt]) -> Drawn:
    """On the host, for what another rank makes of these draws."""
    rows = _logprob_rows(draws)
    token_ids = torch.empty(len(draws), dtype=torch.int64)
    if not rows:
        return Drawn(token_ids)
    shape = (len(rows), _num_best(draws, rows))
    return Drawn(token_ids, rows, (torch.empty(len(rows)), torch.empty(shape), torch.empty(shape, dtype=torch.int64)))


def draw_tokens(logits: Tensor, draws: Sequence[DrawAt]) -> Drawn:
    """Draws one token per row of `logits` [N, V] float32. Never waits for the device."""
    token_ids = logits.argmax(dim=-1)
    random_rows = [row for row, at in enumerate(draws) if at.draw.temperature >= _LEAST_TEMPERATURE]
    if random_rows:
        rows = int_tensor(random_rows, logits.device)
        chosen = [draws[row] for row in random_rows]
        temperatures = device_tensor([at.draw.temperature for at in chosen], torch.float32, logits.device)
        scaled = _filter(logits.index_select(0, rows) / temperatures[:, None], chosen)
        token_ids.index_copy_(0, rows, scaled.sub_(exponential_noise(chosen, logits).log_()).argmax(dim=-1))
    logprob_rows = _logprob_rows(draws)
    if not logprob_rows:
        return Drawn(token_ids)
    rows = int_tensor(logprob_rows, logits.device)
    logprobs = logits.index_select(0, rows).log_softmax(dim=-1)
    best = logprobs.topk(_num_best(draws, logprob_rows), dim=-1)
    of_chosen = logprobs.gather(1, token_ids.index_select(0, rows)[:, None])[:, 0]
    return Drawn(token_ids, logprob_rows, (of_chosen, best.values, best.indices))


def _logprob_rows(draws: Sequence[DrawAt]) -> tuple[int, ...]:
    return tuple(row for row, at in enumerate(draws) if at.draw.num_logprobs is not None)


def _num_best(draws: Sequence[DrawAt], rows: Sequence[int]) -> int:
    return max(draws[row].draw.num_logprobs or 0 for row in rows)


def logprobs_on_host(drawn: Drawn, tensors: Sequence[Tensor], draws: Sequence[DrawAt]) -> list[TokenLogprobs | None]:
    """Per row of the draw, from `drawn.tensors()` copied to the host."""
    found: list[TokenLogprobs | None] = [None] * len(draws)
    if drawn.logprob_rows:
        chosen, best, best_ids = (tensor.tolist() for tensor in tensors[1:])
        for i, row in enumerate(drawn.logprob_rows):
            count = draws[row].draw.num_logprobs
            found[row] = TokenLogprobs(chosen[i], tuple(zip(best_ids[i][:count], best[i][:count], strict=True)))
    return found


def exponential_noise(draws: Sequence[DrawAt], logits: Tensor) -> Tensor:
    """Exp(1) random numbers [N, V] in float32, a function of each row's seed and position."""
    keys = int_tensor([_signed(_row_key(at.draw.seed, at.position)) for at in draws], logits.device)
    counters = torch.arange(1, logits.shape[-1] + 1, device=logits.device) * _signed(_GOLDEN)
    x = keys[:, None] + counters
    x ^= (x >> 30) & ((1 << 34) - 1)  # logical shifts: the mask drops copies of the sign
    x *= _signed(_MULTIPLIERS[0])
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _signed(_MULTIPLIERS[1])  # the last xor-shift of mix() would not change the bits taken here
    bits = (x >> 41) & ((1 << 23) - 1)
    return bits.float().add_(0.5).mul_(2.0**-23).log_().neg_()


def _filter(scaled: Tensor, draws: Sequence[DrawAt]) -> Tensor:
    """Sets what top-k and then top-p exclude to -inf; top-p keeps the smallest set that reaches its mass."""
    filtered = [row for row, at in enumerate(draws) if at.draw.top_k > 0 or at.draw.top_p < 1.0]
    if not filtered:
        return scaled
    device, vocab_size = scaled.device, scaled.shape[-1]
    rows = int_tensor(filtered, device)
    top_k = int_tensor([[draws[row].draw.top_k or vocab_size] for row in filtered], device)
    top_p = device_tensor([[draws[row].draw.top_p] for row in filtered], torch.float32, device)
    values, order = scaled.index_select(0, rows).sort(dim=-1, descending=True, stable=True)
    values.masked_fill_(torch.arange(vocab_size, device=device) >= top_k, float("-inf"))
    probabilities = values.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    excluded = (mass_before >= top_p) & (top_p < 1.0)
    excluded[:, 0] = False
    values.masked_fill_(excluded, float("-inf"))
    return scaled.index_copy_(0, rows, torch.empty_like(values).scatter_(1, order, values))


def _row_key(seed: int, position: int) -> int:
    return _mix((_mix(seed) + position) & _MASK)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
