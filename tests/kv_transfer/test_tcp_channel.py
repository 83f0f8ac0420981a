"""TCP channels: strangers at the door, slabs that are not the expected ones, and landings revoked half way."""

import socket
import threading

import pytest
import torch
from transfer_fleet import HOST

from core.errors import TransferFailed
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.protocol import ChannelId, Landing, Terms
from kv_transfer.channels.tcp import TcpConnector

SOON = 5.0
CHANNEL = ChannelId("a", "b", 1, 1)
GOOD, BAD = Terms(CHANNEL, "token"), Terms(CHANNEL, "guess")


def pool_of(seed: int, block_size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 8, 2, 2, block_size, 8, generator=generator).to(torch.bfloat16)


def span(*blocks: int, num_heads: int = 2) -> Span:
    return Span(0, 3, blocks, 0, num_heads)


def header(source: Span, sequence: int = 0) -> SlabHeader:
    return SlabHeader(sequence, "r", 1, source)


@pytest.fixture
def ranks():
    pools = pool_of(0, 2048), pool_of(1, 2048)  # a block of a layer is 128 KiB: slabs outgrow the socket's buffers
    connectors = [TcpConnector(HOST, pool, SOON) for pool in pools]
    yield pools, *connectors
    for connector in connectors:
        connector.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("channel", "reception"))] == []


def passes(sender, receiver, pools, sequence=0):
    sender.send(header(span(1), sequence), SOON)
    receiver.fetch(header(span(1), sequence), span(2), Landing(), SOON).result(SOON)
    return pools[1][:, 2].equal(pools[0][:, 1])


def test_strangers_are_dropped_and_the_expected_receiver_is_served(ranks):
    pools, ours, theirs = ranks
    sender = ours.sender_end(GOOD)
    host, port = ours.rendezvous.split(":")
    loud, silent = (socket.create_connection((host, int(port))) for _ in range(2))
    loud.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
    loud.settimeout(SOON)
    with pytest.raises(ConnectionResetError):  # closed with bytes unread
        loud.recv(1)
    guesser = theirs.receiver_end(BAD, ours.rendezvous)
    failed = guesser.fetch(header(span(1)), span(2), Landing(), SOON).exception(SOON)
    assert isinstance(failed, TransferFailed) and not guesser.is_open
    receiver = theirs.receiver_end(GOOD, ours.rendezvous)
    assert passes(sender, receiver, pools)
    for end in (sender, receiver, guesser):
        end.abort("over")
    for stranger in (loud, silent):
        stranger.close()


def test_a_sender_that_does_not_know_the_token_is_not_believed(ranks):
    pools, ours, theirs = ranks
    receiver = theirs.receiver_end(GOOD, ours.rendezvous)
    impostor = ours.sender_end(BAD)
    before = pools[1].clone()
    sent = impostor.send(header(span(1)), SOON)
    assert isinstance(receiver.fetch(header(span(1)), span(2), Landing(), SOON).exception(SOON), TransferFailed)
    impostor.abort("over")
    assert isinstance(sent.exception(SOON), TransferFailed)
    receiver.abort("over")
    assert pools[1].equal(before)


def test_a_caller_waits_for_its_channel_no_longer_than_the_connect_timeout():
    pool = pool_of(0)
    connector = TcpConnector(HOST, pool, 0.2)
    lonely = connector.receiver_end(GOOD, connector.rendezvous)
    assert isinstance(lonely.fetch(header(span(1)), span(2), Landing(), 60.0).exception(SOON), TransferFailed)
    unheard = connector.sender_end(GOOD)
    assert isinstance(unheard.send(header(span(1)), 60.0).exception(SOON), TransferFailed)
    for end in (lonely, unheard):
        end.abort("over")
    connector.close()


def test_a_gone_sender_is_noticed_at_once():
    gone = TcpConnector(HOST, pool_of(0), SOON)
    gone.close()
    ours = TcpConnector(HOST, pool_of(1), 60.0)
    receiver = ours.receiver_end(GOOD, gone.rendezvous)
    assert isinstance(receiver.fetch(header(span(1)), span(2), Landing(), 60.0).exception(SOON), TransferFailed)
    receiver.abort("over")
    ours.close()


@pytest.mark.parametrize(("sequence", "blocks"), [(1, (1,)), (0, (1, 2))])
def test_a_slab_that_is_not_the_expected_one_ends_the_channel_before_a_byte_lands(ranks, sequence, blocks):
    pools, ours, theirs = ranks
    sender, receiver = ours.sender_end(GOOD), theirs.receiver_end(GOOD, ours.rendezvous)
    before = pools[1].clone()
    sender.send(header(span(*blocks), sequence), SOON)
    refused = receiver.fetch(header(span(1)), span(2), Landing(), SOON).exception(SOON)
    assert isinstance(refused, TransferFailed) and "slab" in str(refused)
    assert pools[1].equal(before) and not receiver.is_open
    for end in (sender, receiver):
        end.abort("over")


class RevokedAfter(Landing):
    """Revokes itself when some pieces have been written, as another thread would."""

    def __init__(self, num_pieces: int) -> None:
        super().__init__()
        self.num_pieces = num_pieces

    def end_write(self) -> None:
        super().end_write()
        self.num_pieces -= 1
        if not self.num_pieces:
            assert self.revoke().done()  # nobody writes between pieces


def test_a_landing_revoked_half_way_is_written_no_more_and_the_next_slab_arrives(ranks):
    pools, ours, theirs = ranks
    sender, receiver = ours.sender_end(GOOD), theirs.receiver_end(GOOD, ours.rendezvous)
    assert passes(sender, receiver, pools)
    before = pools[1].clone()
    source, destination = span(0, 2, 4, 6, 1, 3, 5), span(1, 3, 5, 7, 0, 4, 6)
    sender.send(header(source, 1), SOON)
    sender.send(header(span(7), 2), SOON)
    cut = receiver.fetch(header(source, 1), destination, RevokedAfter(1), SOON)
    behind = receiver.fetch(header(span(7), 2), span(2), Landing(), SOON)
    assert cut.result(SOON).num_bytes == 0
    assert behind.result(SOON).num_bytes == 3 * 2 * 2 * 2048 * 8 * 2
    assert pools[1][2, 6].equal(before[2, 6]), "the slab's end did not land"
    assert pools[1][:, 2].equal(pools[0][:, 7])
    for end in (sender, receiver):
        end.abort("over")


def test_tiny_runs_are_staged_and_a_staged_slab_keeps_the_landing_rule():
    pools = pool_of(0), pool_of(1)
    ours, theirs = (TcpConnector(HOST, pool, SOON) for pool in pools)
    sender, receiver = ours.sender_end(GOOD), theirs.receiver_end(GOOD, ours.rendezvous)
    gone, before = Landing(), pools[1].clone()
    gone.revoke()
    for sequence in range(2):
        sender.send(header(span(5, 1, num_heads=1), sequence), SOON)
    discarded = receiver.fetch(header(span(5, 1), 0), span(2, 6, num_heads=1), gone, SOON)
    assert discarded.result(SOON).num_bytes == 0 and pools[1].equal(before)
    receiver.fetch(header(span(5, 1), 1), span(2, 6, num_heads=1), Landing(), SOON).result(SOON)
    assert pools[1][:, [2, 6], :, :1].equal(pools[0][:, [5, 1], :, :1])
    for end in (sender, receiver):
        end.abort("over")
    for connector in (ours, theirs):
        connector.close()
