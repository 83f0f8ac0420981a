"""Channels whose receiver reads the sender's pool by itself, the sender in a process of its own."""

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transfer_fleet import HOST, SHARED_PATHS, layout_of, random_pools, shared

from core.config import TransferConfig
from core.errors import TransferFailed
from core.messages.to_rank import SlabHeader, Span
from kv_transfer.channels.one_sided import PullingReceiver
from kv_transfer.channels.protocol import ChannelId, Landing, Terms
from kv_transfer.channels.select import make_connectors
from kv_transfer.runs import runs_of
from kv_transfer.spans import gather, span_bytes

SOON = 10.0
NUM_BLOCKS = 24
a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
nixl = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs the extra nixl")


def terms(generation: int) -> Terms:
    return Terms(ChannelId("a", "b", 1, generation), "token")


def header(source: Span) -> SlabHeader:
    return SlabHeader(0, "r", 1, source)


def pool_of(seed: int) -> torch.Tensor:
    return random_pools(layout_of(), NUM_BLOCKS, seed)[0]


def connector_on(kind: str, seed: int, folder: Path):
    """A rank with a random pool where the kind wants it."""
    pool = pool_of(seed)
    if kind == "cuda_ipc":
        pool = pool.to("cuda")
    elif kind == "shared_memory":
        pool = shared(pool, folder)
    path = SHARED_PATHS.get(pool.data_ptr())
    return pool, make_connectors(TransferConfig(channel=kind), HOST, pool, path)[0]


def _sending_process(kind: str, folder: Path, told) -> None:
    torch.set_num_threads(1)
    _pool, connector = connector_on(kind, 0, folder)
    end = connector.sender_end(terms(1))
    told.put((connector.rendezvous, connector.reach))
    assert end.send(header(Span(0, 3, (0,), 0, 4)), SOON).result(SOON).num_bytes == 3 * 2 * 4 * 4 * 8 * 2
    threading.Event().wait()  # until killed


@pytest.fixture(
    params=["shared_memory", pytest.param("nixl", marks=nixl), pytest.param("cuda_ipc", marks=[pytest.mark.gpu, a_gpu])]
)
def pulled(request, tmp_path):
    """(the sender's rendezvous, own pool, own connector, the sender's process)."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=_sending_process, args=(request.param, tmp_path, told))
    process.start()
    rendezvous, reach = told.get()
    pool, connector = connector_on(request.param, 1, tmp_path)
    assert connector.reach == reach
    yield rendezvous, pool, connector, process
    connector.close()
    process.kill()
    process.join()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("channel")] == []


def test_spans_of_any_form_come_from_another_process_byte_exact(pulled):
    rendezvous, pool, connector, _ = pulled
    end, source, expected = connector.receiver_end(terms(1), rendezvous), pool_of(0), pool_of(1)
    forms = [
        (Span(0, 3, (1, 2, 3), 0, 4), Span(0, 3, (9, 7, 8), 0, 4)),  # whole blocks, neighbours at the source
        (Span(1, 2, (23, 0), 1, 2), Span(1, 2, (0, 23), 2, 2)),  # some layers, some heads
        (Span(2, 1, (5,), 3, 1), Span(2, 1, (5,), 0, 1)),
    ]
    done = [end.fetch(header(taken), filled, Landing(), SOON) for taken, filled in forms]
    for (taken, filled), future in zip(forms, done, strict=True):
        assert future.result(SOON).num_bytes == span_bytes(source, taken)
        layers = slice(taken.first_layer, taken.first_layer + taken.num_layers)
        heads, into = (slice(span.first_head, span.first_head + span.num_heads) for span in (taken, filled))
        expected[layers, list(filled.blocks), :, into] = source[layers, list(taken.blocks), :, heads]
    assert pool.cpu().equal(expected)
    end.abort("over")


def test_a_revoked_slab_from_another_process_is_not_written(pulled):
    rendezvous, pool, connector, _ = pulled
    end, gone = connector.receiver_end(terms(1), rendezvous), Landing()
    gone.revoke().result(SOON)
    whole = Span(0, 3, tuple(range(NUM_BLOCKS)), 0, 4)
    assert end.fetch(header(whole), whole, gone, SOON).result(SOON).num_bytes == 0
    assert pool.cpu().equal(pool_of(1))
    end.abort("over")


def test_a_span_outside_of_the_peers_pool_ends_the_channel_and_a_new_generation_works(pulled):
    rendezvous, pool, connector, _ = pulled
    end, one = connector.receiver_end(terms(1), rendezvous), Span(0, 3, (1,), 0, 4)
    outside = end.fetch(header(Span(0, 3, (NUM_BLOCKS,), 0, 4)), one, Landing(), SOON)
    assert isinstance(outside.exception(SOON), TransferFailed)
    assert not end.is_open
    assert pool.cpu().equal(pool_of(1))
    end.abort("failed")
    for generation in (2, 3):
        end = connector.receiver_end(terms(generation), rendezvous)
        end.fetch(header(one), one, Landing(), SOON).result(SOON)
        end.abort("over")
    assert pool[:, 1].cpu().equal(pool_of(0)[:, 1])


def test_without_its_sender_a_new_channel_fails_or_reads_what_stayed(pulled):
    rendezvous, pool, connector, process = pulled
    one = Span(0, 3, (1,), 0, 4)
    process.kill()
    process.join()
    end = connector.receiver_end(terms(1), rendezvous)
    failure = end.fetch(header(one), one, Landing(), 1.0).exception(SOON)
    if failure is None:  # a file keeps its content
        assert pool[:, 1].cpu().equal(pool_of(0)[:, 1])
    else:
        assert isinstance(failure, TransferFailed)
        assert pool.cpu().equal(pool_of(1))
    end.abort("over")


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """As `pulled`, of NIXL over TCP: reads need the sender's process, which is stopped and in debt of one slab."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=_sending_process, args=("nixl", tmp_path, told))
    process.start()
    rendezvous, _ = told.get()
    pool, connector = connector_on("nixl", 1, tmp_path)
    whole, landing = Span(0, 3, tuple(range(NUM_BLOCKS)), 0, 4), Landing()
    end = connector.receiver_end(terms(1), rendezvous)
    os.kill(process.pid, signal.SIGSTOP)
    assert isinstance(end.fetch(header(whole), whole, landing, 0.3).exception(SOON), TransferFailed)
    end.abort("failed")
    landing.revoke().result(0)
    yield rendezvous, pool, connector, process
    process.kill()
    process.join()


@nixl
def test_what_comes_late_from_a_stopped_process_lands_nowhere(stopped):
    rendezvous, pool, connector, process = stopped
    os.kill(process.pid, signal.SIGCONT)
    end, one = connector.receiver_end(terms(2), rendezvous), Span(0, 3, (1,), 0, 4)
    end.fetch(header(one), one, Landing(), SOON).result(SOON)  # comes behind what was late
    expected = pool_of(1)
    expected[:, 1] = pool_of(0)[:, 1]
    assert pool.equal(expected)
    end.abort("over")
    connector.close()


@nixl
def test_a_connector_closes_while_a_stopped_process_owes_it_bytes(stopped):
    _, pool, connector, process = stopped
    connector.close()
    os.kill(process.pid, signal.SIGCONT)
    assert pool.equal(pool_of(1))


# ---- pulling, whatever the transport --------------------------------------------------------------------------------


class LocalPeer:
    """A peer's pool in this process, whose pulls wait until they may go on."""

    def __init__(self, pool: torch.Tensor) -> None:
        self.pool = pool
        self.may_pull = threading.Event()
        self.may_pull.set()
        self.is_pulling = threading.Event()
        self.aborted = threading.Event()
        self.late: list[torch.Tensor] = []

    def open(self, aborted: threading.Event) -> "LocalPeer":
        self.aborted = aborted
        return self

    def pull(self, source: Span, deadline: float) -> torch.Tensor:
        slab = torch.empty(span_bytes(self.pool, source), dtype=torch.uint8)
        self.is_pulling.set()
        while not self.may_pull.wait(0.001):
            if self.aborted.is_set() or time.monotonic() > deadline:
                self.late.append(slab)
                raise TransferFailed("aborted, or not over before the deadline")
        gather(self.pool, source, slab)
        return slab

    def stream(self):
        return nullcontext()

    def abort(self) -> None:
        pass


def test_a_slab_whose_landing_is_revoked_while_it_is_pulled_is_dropped():
    peer, pool, landing = LocalPeer(pool_of(0)), pool_of(1), Landing()
    end, one = PullingReceiver("a>b", pool, peer.open), Span(0, 3, (1,), 0, 4)
    peer.may_pull.clear()
    future = end.fetch(header(one), one, landing, SOON)
    assert peer.is_pulling.wait(SOON)
    landing.revoke().result(0)  # nobody writes yet: quiet at once
    peer.may_pull.set()
    passage = future.result(SOON)
    assert passage.num_bytes == 0 and passage.begun_at <= passage.turned_at == passage.done_at
    assert pool.equal(pool_of(1))
    end.abort("over")


@pytest.mark.parametrize("cause", ["deadline", "abort"])
def test_a_pull_that_hangs_ends_the_channel_and_lets_go_of_the_destination(cause):
    peer, pool, landing = LocalPeer(pool_of(0)), pool_of(1), Landing()
    end, one = PullingReceiver("a>b", pool, peer.open), Span(0, 3, (1,), 0, 4)
    peer.may_pull.clear()
    future = end.fetch(header(one), one, landing, 0.05 if cause == "deadline" else 60.0)
    assert peer.is_pulling.wait(SOON)
    if cause == "abort":
        end.abort("enough")
    assert isinstance(future.exception(SOON), TransferFailed)
    landing.revoke().result(0)
    peer.late[0].fill_(7)  # what the transport still does reaches a slab that nobody places
    assert pool.equal(pool_of(1))
    end.abort("over")


def test_neighbours_of_a_span_are_read_in_one_piece():
    pool = pool_of(0)  # 4 heads of 4 tokens x 8 x 2 bytes: a row of K or V is 256 bytes, a block 512, a layer 24 blocks
    whole = runs_of(pool, Span(0, 2, (4, 5, 9), 0, 4))
    assert (whole.starts.tolist(), whole.lengths.tolist()) == (
        [4 * 512, 9 * 512, (24 + 4) * 512, (24 + 9) * 512],
        [1024, 512, 1024, 512],
    )
    some_heads = runs_of(pool, Span(1, 1, (0, 1), 1, 2))
    assert some_heads.starts.tolist() == [(24 * 2 + row) * 256 + 64 for row in range(4)]
    assert some_heads.lengths.tolist() == [128] * 4
    assert runs_of(pool, Span(0, 3, tuple(range(NUM_BLOCKS)), 0, 4)).lengths.tolist() == [pool.numel() * 2]


@pytest.mark.parametrize("span", [Span(0, 3, (7, 2, 3, 4), 0, 4), Span(1, 2, (5, 6), 2, 2), Span(2, 1, (0,), 0, 1)])
def test_runs_follow_the_order_of_gather(span):
    pool = pool_of(0)
    slab = torch.empty(span_bytes(pool, span), dtype=torch.uint8)
    gather(pool, span, slab)
    runs, stored = runs_of(pool, span), pool.view(torch.uint8).flatten()
    pieces = [stored[start : start + size] for start, size in zip(runs.starts, runs.lengths, strict=True)]
    assert torch.cat(pieces).equal(slab)
