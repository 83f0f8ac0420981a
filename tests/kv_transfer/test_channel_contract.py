"""What every channel promises; most of it to two-sided ones. Both ends live in this process as threads."""

import importlib.util
import multiprocessing
import os
import random
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transfer_fleet import HOST, connector_of, make_hub, shared

from core.errors import TransferFailed
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.gloo import gloo_connector
from kv_transfer.channels.protocol import ChannelId, Connector, Landing, Passage, ReceiverEnd, SenderEnd, Terms

NUM_BLOCKS = 32
SOON = 5.0  # seconds by which everything but a deliberate wait is over

nixl = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs the extra nixl")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
KINDS = ["in_process", "strict", "gloo", "tcp", pytest.param("nccl", marks=[pytest.mark.gpu, two_gpus])]


def random_pool(seed: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, NUM_BLOCKS, 2, 2, 4, 8, generator=generator).to(torch.bfloat16).to(device)


def span(*blocks: int, first_head: int = 0, num_heads: int = 2) -> Span:
    return Span(0, 3, blocks, first_head, num_heads)


def terms(generation: int) -> Terms:
    return Terms(ChannelId("a", "b", 1, generation), "token")


def header(source: Span, sequence: int = 0) -> SlabHeader:
    return SlabHeader(sequence, "r", 1, source)


@dataclass
class Pair:
    """Two ranks and whatever channels tests open between them."""

    source: torch.Tensor
    destination: torch.Tensor
    connectors: tuple[Connector, Connector]

    def __post_init__(self) -> None:
        self.ends: list[SenderEnd | ReceiverEnd] = []
        self.generation = 0

    def sender(self, generation: int) -> SenderEnd:
        self.ends.append(end := self.connectors[0].sender_end(terms(generation)))
        return end

    def receiver(self, generation: int) -> ReceiverEnd:
        rendezvous = self.connectors[0].rendezvous
        self.ends.append(end := self.connectors[1].receiver_end(terms(generation), rendezvous))
        return end

    def channel(self) -> tuple[SenderEnd, ReceiverEnd]:
        self.generation += 1
        return self.sender(self.generation), self.receiver(self.generation)

    def close(self) -> None:
        for end in self.ends:
            end.abort("test is over")
        for connector in self.connectors:
            connector.close()


def make_pair(kind: str, folder: Path) -> Pair:
    devices = ("cuda:0", "cuda:1") if kind == "nccl" else ("cpu", "cpu")
    hub = make_hub(kind)
    pools = [random_pool(seed, device) for seed, device in enumerate(devices)]
    if kind == "shared_memory":
        pools = [shared(pool, folder) for pool in pools]
    return Pair(*pools, tuple(connector_of(kind, hub, pool) for pool in pools))


def close_pair(pair: Pair) -> None:
    pair.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("channel")] == []


@pytest.fixture(params=[*KINDS, "shared_memory", pytest.param("nixl", marks=nixl)])
def any_pair(request, tmp_path):
    pair = make_pair(request.param, tmp_path)
    yield pair
    close_pair(pair)


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """Of a two-sided channel: a fetch waits for its send."""
    pair = make_pair(request.param, tmp_path)
    yield pair
    close_pair(pair)


def failure_of(future: "Future[Passage]") -> BaseException | None:
    return future.exception(SOON)


def test_slabs_of_all_sizes_arrive_in_order_byte_exact(any_pair):
    sender, receiver = any_pair.channel()
    chosen, done = random.Random(7), []
    expected = any_pair.destination.clone()
    for sequence in range(40):
        num = chosen.randint(1, 6)
        first_head, num_heads = chosen.choice([(0, 2), (0, 1), (1, 1)])
        taken = span(*chosen.sample(range(NUM_BLOCKS), num), first_head=first_head, num_heads=num_heads)
        filled = span(*chosen.sample(range(NUM_BLOCKS), num), first_head=0, num_heads=num_heads)
        source_heads = slice(first_head, first_head + num_heads)
        expected[:, list(filled.blocks), :, :num_heads] = any_pair.source[:, list(taken.blocks), :, source_heads].to(
            expected.device
        )
        sender.send(header(taken, sequence), SOON)
        done.append(receiver.fetch(header(taken, sequence), filled, Landing(), SOON))
    sizes = [future.result(SOON).num_bytes for future in done]
    assert any_pair.destination.equal(expected)
    assert sizes[0] % (3 * 2 * 4 * 8 * 2) == 0 and sum(sizes) > 0


def test_fetches_may_be_posted_long_before_or_after_their_sends(pair):
    sender, receiver = pair.channel()
    early = [receiver.fetch(header(span(i), i), span(i), Landing(), SOON) for i in range(4)]
    sends = [sender.send(header(span(i), i), SOON) for i in range(8)]
    assert [future.result(SOON).num_bytes for future in early] == [3 * 2 * 2 * 4 * 8 * 2] * 4
    late = [receiver.fetch(header(span(i), i), span(i), Landing(), SOON) for i in range(4, 8)]
    assert not wait([*late, *sends], SOON).not_done
    assert pair.destination[:, :8].equal(pair.source[:, :8].to(pair.destination.device))


def test_a_revoked_landing_is_never_written(any_pair):
    sender, receiver = any_pair.channel()
    gone, before = Landing(), any_pair.destination.clone()
    gone.revoke().result(SOON)
    sender.send(header(span(1), 0), SOON)
    assert receiver.fetch(header(span(1), 0), span(1), gone, SOON).result(SOON).num_bytes == 0
    assert any_pair.destination.equal(before)
    receiver.abort("enough")
    assert not receiver.is_open
    assert isinstance(failure_of(receiver.fetch(header(span(1), 1), span(1), Landing(), SOON)), TransferFailed)
    sender.abort("enough")
    assert isinstance(failure_of(sender.send(header(span(1), 1), SOON)), TransferFailed)
    assert any_pair.destination.equal(before)


def test_a_discarded_slab_writes_nothing_and_the_next_one_arrives(pair):
    sender, receiver = pair.channel()
    gone, wanted = Landing(), Landing()
    before = pair.destination.clone()
    first = receiver.fetch(header(span(1), 0), span(1), gone, SOON)
    second = receiver.fetch(header(span(2), 1), span(2), wanted, SOON)
    gone.revoke().result(SOON)
    sender.send(header(span(1), 0), SOON)
    sender.send(header(span(2), 1), SOON)
    assert first.result(SOON).num_bytes == 0
    assert second.result(SOON).num_bytes > 0
    assert pair.destination[:, 1].equal(before[:, 1])
    assert pair.destination[:, 2].equal(pair.source[:, 2].to(pair.destination.device))


@pytest.mark.parametrize("who", ["sender", "receiver"])
@pytest.mark.parametrize("connected", [True, False])
def test_an_abort_ends_a_waiting_fetch_and_nothing_is_written_afterwards(pair, who, connected):
    sender, receiver = pair.channel()
    if connected:
        sender.send(header(span(0), 0), SOON)
        receiver.fetch(header(span(0), 0), span(0), Landing(), SOON).result(SOON)
    waiting = [receiver.fetch(header(span(i), i), span(i), Landing(), 60.0) for i in range(1, 4)]
    before = pair.destination.clone()
    first, second = (sender, receiver) if who == "sender" else (receiver, sender)
    first.abort("enough")
    if not connected:  # a connected peer notices by itself, one that still waits is told by CloseChannel
        second.abort("nobody came")
    for future in waiting:
        assert isinstance(failure_of(future), TransferFailed)
    assert isinstance(failure_of(receiver.fetch(header(span(9), 4), span(9), Landing(), SOON)), TransferFailed)
    assert not receiver.is_open
    late = sender.send(header(span(1), 1), 1.0)  # Gloo now and then overlooks a peer that has just gone
    assert isinstance(failure_of(late), TransferFailed)
    assert pair.destination.equal(before)


def test_a_waiting_send_ends_with_its_receiver(pair):
    sender, receiver = pair.channel()
    sender.send(header(span(0), 0), SOON)
    receiver.fetch(header(span(0), 0), span(0), Landing(), SOON).result(SOON)
    receiver.abort("gone")
    futures = [sender.send(header(span(i), i), SOON) for i in range(1, 4)]
    assert isinstance(failure_of(futures[-1]), TransferFailed)


def test_a_silent_peer_costs_the_deadline_and_poisons_the_channel(pair):
    sender, receiver = pair.channel()
    sender.send(header(span(0), 0), SOON)
    receiver.fetch(header(span(0), 0), span(0), Landing(), SOON).result(SOON)
    before = pair.destination.clone()
    silent = receiver.fetch(header(span(1), 1), span(1), Landing(), 0.1)
    behind = receiver.fetch(header(span(2), 2), span(2), Landing(), 60.0)
    assert isinstance(failure_of(silent), TransferFailed)
    assert isinstance(failure_of(behind), TransferFailed)
    wait([sender.send(header(span(1), 1), SOON)], SOON)
    assert pair.destination.equal(before)


class HeldBack(Landing):
    """Its writer waits at the door."""

    def __init__(self) -> None:
        super().__init__()
        self.has_come, self.may_enter = threading.Event(), threading.Event()

    def begin_write(self) -> bool:
        self.has_come.set()
        assert self.may_enter.wait(SOON)
        return super().begin_write()


def test_a_slab_comes_while_the_one_before_it_is_still_being_placed(pair):
    sender, receiver = pair.channel()
    landings = [HeldBack(), HeldBack(), Landing()]
    fetches = [receiver.fetch(header(span(i), i), span(i), landing, SOON) for i, landing in enumerate(landings)]
    sends = [sender.send(header(span(i), i), SOON) for i in range(3)]
    assert landings[0].has_come.wait(SOON)  # from now on two fetches wait to be started
    landings[0].may_enter.set()
    assert landings[1].has_come.wait(SOON)
    assert sends[2].result(SOON).num_bytes > 0 and not fetches[1].done()
    landings[1].may_enter.set()
    assert not wait(fetches, SOON).not_done
    assert pair.destination[:, :3].equal(pair.source[:, :3].to(pair.destination.device))


def test_a_new_generation_works_after_an_abort(any_pair):
    for _ in range(3):
        sender, receiver = any_pair.channel()
        sender.send(header(span(3, 4), 0), SOON)
        receiver.fetch(header(span(3, 4), 0), span(5, 6), Landing(), SOON).result(SOON)
        receiver.abort("again")
        sender.abort("again")
        assert any_pair.destination[:, 5:7].equal(any_pair.source[:, 3:5].to(any_pair.destination.device))
        any_pair.destination.zero_()


def test_ends_of_different_generations_never_meet(pair):
    sender, receiver = pair.sender(1), pair.receiver(2)
    before = pair.destination.clone()
    sender.send(header(span(0), 0), SOON)
    lonely = receiver.fetch(header(span(0), 0), span(0), Landing(), 60.0)
    assert not wait([lonely], 0.05).done
    receiver.abort("nobody came")
    assert isinstance(failure_of(lonely), TransferFailed)
    assert pair.destination.equal(before)


def test_unequal_slabs_fail_instead_of_landing(pair):
    sender, receiver = pair.channel()
    before = pair.destination.clone()
    sender.send(header(span(1, 2), 0), 0.3)
    short = receiver.fetch(header(span(1), 0), span(1), Landing(), 0.3)
    assert isinstance(failure_of(short), TransferFailed)
    assert pair.destination.equal(before)


def test_a_shared_pool_that_is_gone_or_cut_fails_the_fetch(tmp_path):
    pair = make_pair("shared_memory", tmp_path)
    path = Path(pair.connectors[0].rendezvous.split(":")[0])
    for spoil in (lambda: os.truncate(path, 100), path.unlink):
        spoiled = tmp_path / "copy"
        spoiled.write_bytes(path.read_bytes())
        path.replace(tmp_path / "kept")
        spoiled.replace(path)
        spoil()
        _, receiver = pair.channel()
        assert isinstance(failure_of(receiver.fetch(header(span(1)), span(1), Landing(), SOON)), TransferFailed)
        (tmp_path / "kept").replace(path)
    close_pair(pair)


# ---- two processes ----------------------------------------------------------------------------------------------


def _sending_process(told) -> None:
    torch.set_num_threads(1)
    connector = gloo_connector(HOST, random_pool(0), SOON)
    told.put(connector.rendezvous)
    end = connector.sender_end(terms(1))
    for sequence in range(8):
        end.send(header(span(sequence), sequence), SOON).result(SOON)
    threading.Event().wait()  # until killed


def test_gloo_between_processes_carries_slabs_and_notices_a_killed_sender():
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=_sending_process, args=(told,))
    process.start()
    pool = random_pool(1)
    connector = gloo_connector(HOST, pool, SOON)
    end = connector.receiver_end(terms(1), told.get())
    done = [end.fetch(header(span(i), i), span(i), Landing(), SOON) for i in range(8)]
    assert not wait(done, 2 * SOON).not_done
    assert pool[:, :8].equal(random_pool(0)[:, :8])
    orphan = end.fetch(header(span(9), 8), span(9), Landing(), 60.0)
    process.kill()
    assert isinstance(failure_of(orphan), TransferFailed)
    process.join()
    end.abort("over")
    connector.close()
