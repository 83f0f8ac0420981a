"""How the ends of a 2-rank group meet: none begins the blocking set-up alone, whoever gives up or intrudes."""

import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore
from transfer_fleet import HOST

from core.errors import TransferFailed
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.in_process import Line
from kv_transfer.channels.protocol import ChannelId, Landing, Terms
from kv_transfer.channels.rendezvous import RECEIVER, SENDER, GroupConnector

TERMS = Terms(ChannelId("a", "b", 1, 1), "token")
SPAN = Span(0, 1, (0,), 0, 1)


class Group:
    """Stands for a backend: counts the ends that began their set-up."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.began: list[int] = []
        self.both = threading.Event()
        self.line = Line()
        self.pool = torch.zeros(1, 2, 2, 1, 4, 8)
        self.connector = GroupConnector("test", HOST, self.pool, self.set_up, timeout_s)

    def set_up(self, store, rank):
        self.began.append(rank)
        if len(self.began) == 2:
            self.both.set()
        assert self.both.wait(5)
        return self.line.wire(rank)


def fetch(receiver):
    return receiver.fetch(SlabHeader(0, "r", 1, SPAN), SPAN, Landing(), 5.0)


def test_both_ends_set_up_once_both_are_there():
    group = Group()
    receiver = group.connector.receiver_end(TERMS, group.connector.rendezvous)
    sender = group.connector.sender_end(TERMS)
    sender.send(SlabHeader(0, "r", 1, SPAN), 5.0)
    assert fetch(receiver).result(5).num_bytes == 2 * 4 * 8 * 4
    assert sorted(group.began) == [SENDER, RECEIVER]
    sender.abort("over")
    receiver.abort("over")


@pytest.mark.parametrize("gives_up", ["sender", "receiver"])
def test_an_end_that_gave_up_lets_nobody_set_up(gives_up):
    group = Group(timeout_s=0.3)
    if gives_up == "sender":
        group.connector.sender_end(TERMS).abort("no longer wanted")
        late = group.connector.receiver_end(TERMS, group.connector.rendezvous)
        failure = fetch(late).exception(5)
    else:
        group.connector.receiver_end(TERMS, group.connector.rendezvous).abort("no longer wanted")
        late = group.connector.sender_end(TERMS)
        failure = late.send(SlabHeader(0, "r", 1, SPAN), 5.0).exception(5)
    assert isinstance(failure, TransferFailed)
    assert group.began == []
    late.abort("over")


def test_aborts_at_any_moment_of_connecting_leave_no_end_alone_in_the_set_up():
    for _ in range(10):
        group = Group()
        ends = [
            group.connector.sender_end(TERMS),
            group.connector.receiver_end(TERMS, group.connector.rendezvous),
        ]
        for end in ends:
            end.abort("at once")
        assert len(group.began) in (0, 2)
        group.connector.close()


def stranger_at(group: Group) -> TCPStore:
    """Anyone on the network, at the open store."""
    host, port = group.connector.rendezvous.split(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))


def until_key(store: TCPStore, name: str) -> str:
    """The full name of the key that ends in `name`, once it is there, as a stranger may find it."""
    for _ in range(2500):
        for key in store.list_keys():
            if key.endswith(name):
                return key
        threading.Event().wait(0.002)
    raise AssertionError(f"no {name}")


def test_who_knows_the_channel_but_not_the_token_meets_nobody_and_the_right_end_does():
    group = Group()
    sender = group.connector.sender_end(TERMS)
    stranger = group.connector.receiver_end(Terms(TERMS.channel, "guess"), group.connector.rendezvous)
    refused = fetch(stranger)
    receiver = group.connector.receiver_end(TERMS, group.connector.rendezvous)
    sent = sender.send(SlabHeader(0, "r", 1, SPAN), 5.0)
    assert fetch(receiver).result(5).num_bytes == 2 * 4 * 8 * 4
    sent.result(5)
    assert sorted(group.began) == [SENDER, RECEIVER]
    stranger.abort("enough")
    assert isinstance(refused.exception(5), TransferFailed) and len(group.began) == 2
    for end in (sender, receiver):
        end.abort("over")


def test_the_open_store_tells_neither_token_nor_channel():
    group = Group()
    sender = group.connector.sender_end(TERMS)
    store = stranger_at(group)
    key = until_key(store, "waiting")
    seen = key + store.get(key).decode()
    assert TERMS.token not in seen and str(TERMS.channel) not in seen
    sender.abort("over")


@pytest.mark.parametrize("word", [b"go", b"", b"0" * 64])
def test_a_stranger_who_forges_the_receivers_verdict_makes_no_sender_set_up(word):
    group = Group()
    sender = group.connector.sender_end(TERMS)
    failure = sender.send(SlabHeader(0, "r", 1, SPAN), 5.0)
    store = stranger_at(group)
    store.set(until_key(store, "waiting").replace("waiting", "verdict"), word)
    assert isinstance(failure.exception(5), TransferFailed)
    assert "stranger" in str(failure.exception(5)) and group.began == []
    sender.abort("over")


def test_a_stranger_who_repeats_what_the_sender_said_is_not_taken_for_the_receiver():
    group = Group()
    sender = group.connector.sender_end(TERMS)
    failure = sender.send(SlabHeader(0, "r", 1, SPAN), 5.0)
    store = stranger_at(group)
    key = until_key(store, "waiting")
    store.set(key.replace("waiting", "verdict"), store.get(key))
    assert isinstance(failure.exception(5), TransferFailed) and group.began == []
    sender.abort("over")


def test_a_stranger_who_forges_the_senders_presence_makes_no_receiver_set_up():
    group = Group()
    sender = group.connector.sender_end(TERMS)
    store = stranger_at(group)
    store.set(until_key(store, "waiting"), b"")
    receiver = group.connector.receiver_end(TERMS, group.connector.rendezvous)
    assert "stranger" in str(fetch(receiver).exception(5)) and group.began == []
    for end in (sender, receiver):
        end.abort("over")
