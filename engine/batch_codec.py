"""Step batches as flat lists of 64-bit integers, for the broadcast from a replica's first rank."""

import struct
from collections.abc import Iterator
from itertools import islice

from engine.batch import BlockTable, Draw, SequenceStep, StepBatch

_NO_LOGPROBS = -1


def encode_batch(batch: StepBatch) -> list[int]:
    """Floats travel as their bits, so every rank sees the same numbers."""
    values = [len(batch.sequences)]
    for sequence in batch.sequences:
        counts = len(sequence.token_ids), len(sequence.block_tables), sequence.first_position
        values += (*counts, sequence.draw is not None, *sequence.token_ids)
        for table in sequence.block_tables:
            values += (table.first, len(table.blocks), *table.blocks)
        if sequence.draw is not None:
            values += _encode_draw(sequence.draw)
    return values


def decode_batch(values: list[int]) -> StepBatch:
    """Inverse of `encode_batch`."""
    stream = iter(values)
    return StepBatch(tuple(_decode_sequence(stream) for _ in range(next(stream))))


def _decode_sequence(stream: Iterator[int]) -> SequenceStep:
    num_tokens, num_tables, first_position, has_draw = islice(stream, 4)
    token_ids = tuple(islice(stream, num_tokens))
    block_tables = tuple(_decode_table(stream) for _ in range(num_tables))
    return SequenceStep(token_ids, first_position, block_tables, _decode_draw(stream) if has_draw else None)


def _decode_table(stream: Iterator[int]) -> BlockTable:
    first, num_blocks = islice(stream, 2)
    return BlockTable(tuple(islice(stream, num_blocks)), first)


def _encode_draw(draw: Draw) -> list[int]:
    num_logprobs = _NO_LOGPROBS if draw.num_logprobs is None else draw.num_logprobs
    return [*struct.unpack("2q", struct.pack("2d", draw.temperature, draw.top_p)), draw.top_k, draw.seed, num_logprobs]


def _decode_draw(stream: Iterator[int]) -> Draw:
    temperature_bits, top_p_bits, top_k, seed, num_logprobs = islice(stream, 5)
    temperature, top_p = struct.unpack("2d", struct.pack("2q", temperature_bits, top_p_bits))
    return Draw(temperature, top_p, top_k, seed, None if num_logprobs == _NO_LOGPROBS else num_logprobs)
