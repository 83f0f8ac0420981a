"""A 64-bit digest of a span's bytes, equal wherever equal content lies: end-to-end proof that KV came as it left.

Multilinear hashing (Carter and Wegman, "Universal classes of hash functions", 1979; the integer form is Lemire and
Kaser's, "Strongly universal string hashing is fast", 2014) in two levels, modulo 2^64:

    digest = sum over chunks c of   m_c * sum over words i of chunk c of   k_i * w_ci

w are the bytes in gather order as signed 32-bit words, zeros behind the last; chunks have 2^15 words. k and m are odd
numbers from splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) of their index.

Words have half the width of keys on purpose. Words that differ by d contribute k * m * d; with an odd factor that is
zero only for d = 0, so content that differs in one word never collides. Where more differ, let 2^t be the largest
power of two that divides all differences; as 32-bit words differ by less than 2^32, t <= 31. Were the keys random, one
level would collide with a probability of at most 2^-(63 - t): 2^-63 when a lowest bit differs anywhere, never above
2^-32. (Words as wide as the keys would have t = 63: two flipped top bits, signs of bfloat16, would always collide.)
The second level makes that 129 times as much at most: of a chunk that differs, the 64-bit sum may itself be divisible
by 2^j, with a probability of at most 2^-(j - 1 - t), for each j up to 63. The keys are fixed: this finds accidents, not
forgeries.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from core.messages.to_rank import Span
from kv_transfer.spans import gather, span_bytes

_WORD_BYTES = 4
_CHUNK_WORDS = 2**15
_STEP_BYTES = 2**21  # gathered at a time
_FIRST_CHUNK_KEY = 2**32  # the keys of chunks follow far behind those of words


def digest(pool: Tensor, span: Span) -> int:
    """The digest of a span, in [0, 2^64): computed on the pool's device, with some MiB beside the pool.

    To be compared between spans of one shape: as many layers, pieces, tokens of a piece, heads and bytes of a number.
    Every part of a span that is gathered at a time begins a new chunk.
    """
    sums, buffer = [], torch.empty(0, dtype=torch.int32, device=pool.device)
    for step in _steps(pool, span):
        num_bytes = span_bytes(pool, step)
        num_words = -(-num_bytes // _WORD_BYTES)
        if buffer.numel() < num_words:
            buffer = buffer.new_zeros(num_words)
        words = buffer[:num_words]
        words[-1] = 0
        gather(pool, step, words.view(torch.uint8)[:num_bytes])
        sums.append(_sums(words))
    first_level = torch.cat(sums)
    return int((first_level * _keys(_FIRST_CHUNK_KEY, len(first_level)).to(pool.device)).sum()) % 2**64


def _sums(words: Tensor) -> Tensor:
    """The first level, [chunks]; on a CPU chunk by chunk, which stays in its cache."""
    keys = _word_keys(words.device)
    if words.is_cuda:
        return (pad(words, (0, -len(words) % _CHUNK_WORDS)).view(-1, _CHUNK_WORDS) * keys).sum(1)
    return torch.stack([torch.dot(chunk.long(), keys[: len(chunk)]) for chunk in torch.split(words, _CHUNK_WORDS)])


def _steps(pool: Tensor, span: Span) -> Iterator[Span]:
    """The span in parts of at most _STEP_BYTES, or one layer of one piece, in gather order."""
    num_pieces = len(span.blocks)
    cell_bytes = span_bytes(pool, replace(span, num_layers=1, blocks=span.blocks[:1]))
    layers_at_once = max(1, _STEP_BYTES // (cell_bytes * num_pieces))
    pieces_at_once = max(1, _STEP_BYTES // cell_bytes)
    for layer in range(0, span.num_layers, layers_at_once):
        for piece in range(0, num_pieces, pieces_at_once):
            yield replace(
                span,
                first_layer=span.first_layer + layer,
                num_layers=min(layers_at_once, span.num_layers - layer),
                blocks=span.blocks[piece : piece + pieces_at_once],
            )


@cache
def _word_keys(device: torch.device) -> Tensor:
    return _keys(0, _CHUNK_WORDS).to(device)


def _keys(first: int, num: int) -> Tensor:
    """splitmix64 of the indices [first, first + num), made odd; int64, which wraps as uint64 does."""
    mixed = torch.arange(first + 1, first + num + 1) * _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in; int64 shifts copies of its sign."""
    return torch.bitwise_and(torch.bitwise_right_shift(numbers, bits), 2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64."""
    return number - 2**64 if number >= 2**63 else number
