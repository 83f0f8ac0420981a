"""KV that travels as float8: how large it is, what it loses, and that it takes the channels' ordinary way."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fleet import make_hub

from core.config import TransferConfig
from core.errors import ConfigurationError, TransferFailed
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.in_process import InProcessConnector
from kv_transfer.channels.protocol import ChannelId, Landing, Terms
from kv_transfer.wire_format import AsStored, Float8, make_wire_format

SPAN = Span(1, 2, (7, 2, 5), 1, 2)
ELSEWHERE = Span(1, 2, (0, 1, 2), 1, 2)
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
FLOATS = list(ROUNDING)


def pool_of(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(3, 8, 2, 4, 8, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def part(pool: torch.Tensor, span: Span) -> torch.Tensor:
    layers = slice(span.first_layer, span.first_layer + span.num_layers)
    return pool[layers, list(span.blocks)][:, :, :, span.first_head : span.first_head + span.num_heads]


def through(source: torch.Tensor, taken: Span, destination: torch.Tensor, filled: Span) -> None:
    slab = torch.empty(Float8().num_bytes(source, taken), dtype=torch.uint8)
    Float8().pack(source, taken, slab)
    Float8().unpack(slab, destination, filled)


def require_within_the_bound(stored: torch.Tensor, received: torch.Tensor) -> None:
    """The bound that Float8 states; rows are [..., tokens, head_dim]."""
    exact = stored.double()
    largest = exact.abs().amax((-2, -1), keepdim=True).clamp(min=2.0**-117)
    bound = torch.maximum(exact.abs() / 16, largest / 458752) + exact.abs() * ROUNDING[stored.dtype]
    smallest = torch.finfo(stored.dtype).smallest_normal * torch.finfo(stored.dtype).eps  # a subnormal's rounding
    assert bool(((received.double() - exact).abs() <= bound + smallest).all())


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FLOATS), st.integers(0, 1000), st.integers(-130, 20), st.integers(0, 12))
def test_numbers_come_back_within_the_stated_bound(dtype, seed, exponent, spread):
    """Of any size, and in rows whose numbers differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(3, 8, 2, 4, 8, 6, generator=generator) * 2.0**exponent
    wide *= torch.exp2(-spread * torch.rand(wide.shape, generator=generator))
    source, destination = wide.clamp(-60000, 60000).to(dtype), pool_of(2, dtype)
    before = destination.clone()
    through(source, SPAN, destination, ELSEWHERE)
    require_within_the_bound(part(source, SPAN), part(destination, ELSEWHERE))
    part_before = before[:, 3:]
    assert destination[:, 3:].equal(part_before) and destination[0].equal(before[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_of_zeros_and_each_rows_largest_number_come_back_as_they_were(dtype):
    source, destination = pool_of(1, dtype), pool_of(2, dtype)
    source[1, 7, 0, 1] = 0
    through(source, SPAN, destination, ELSEWHERE)
    assert not destination[1, 0, 0, 1].any()
    stored, received = (part(pool, span).flatten(-2) for pool, span in ((source, SPAN), (destination, ELSEWHERE)))
    place = stored.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(received.gather(-1, place), stored.gather(-1, place), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_sizes_are_exact(dtype, size):
    num_numbers, num_rows = 2 * 3 * 2 * 2 * 8 * 6, 2 * 3 * 2 * 2
    pool = pool_of(1, dtype)
    assert AsStored().num_bytes(pool, SPAN) == num_numbers * size
    assert Float8().num_bytes(pool, SPAN) == num_numbers + 4 * num_rows
    assert Float8().num_bytes(pool, replace(SPAN, block_tokens=2)) == num_numbers // 4 + 4 * num_rows


def test_the_error_of_normal_numbers_is_about_a_fortieth():
    assert 0.02 < Float8().relative_error(pool_of(1), SPAN) < 0.03
    exact = torch.full((3, 8, 2, 4, 8, 6), 1.5, dtype=torch.bfloat16)
    assert Float8().relative_error(exact, SPAN) == 0.0


def test_pieces_of_other_blocks_travel_too():
    source, destination = pool_of(1), torch.zeros(3, 8, 2, 4, 4, 6, dtype=torch.bfloat16)
    through(source, Span(0, 3, (3, 4), 0, 4, 4), destination, Span(0, 3, (6, 1), 0, 4, 4))
    require_within_the_bound(source[:, 1, :, :, 4:], destination[:, 6])
    require_within_the_bound(source[:, 2, :, :, :4], destination[:, 1])


@pytest.mark.parametrize("kind", ["in_process", "strict"])
def test_a_channel_carries_float8_when_its_terms_say_so(kind):
    hub, source, destination = make_hub(kind), pool_of(1), pool_of(2)
    terms = Terms(ChannelId("a", "b", 1, 1), "token", TransferConfig(wire_dtype="float8_e4m3fn").wire_dtype)
    sender = InProcessConnector(hub, source).sender_end(terms)
    receiver = InProcessConnector(hub, destination).receiver_end(terms, "")
    expected = destination.clone()
    through(source, SPAN, expected, ELSEWHERE)
    sender.send(SlabHeader(0, "r", 1, SPAN), 5.0)
    passage = receiver.fetch(SlabHeader(0, "r", 1, SPAN), ELSEWHERE, Landing(), 5.0).result(5.0)
    assert passage.num_bytes == 2 * 3 * 2 * 2 * 8 * 6 * 2
    assert destination.equal(expected) and not part(destination, ELSEWHERE).equal(part(source, SPAN))
    for end in (sender, receiver):
        end.abort("over")
    assert [t.name for t in threading.enumerate() if t.name.startswith("channel")] == []


def test_what_cannot_travel_so_is_refused():
    assert isinstance(make_wire_format(""), AsStored)
    with pytest.raises(ConfigurationError) as caught:
        make_wire_format("int4")
    assert caught.value.field == "transfer.wire_dtype"
    for dtype in (torch.float8_e4m3fn, torch.uint8):
        with pytest.raises(TransferFailed, match="cannot travel"):
            Float8().num_bytes(pool_of(1).to(dtype), SPAN)
