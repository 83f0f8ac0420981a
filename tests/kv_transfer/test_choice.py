"""Which transports a rank offers, and which one two ranks take."""

import logging
from pathlib import Path

import pytest
import torch
from transfer_fleet import HOST, layout_of, random_pools, shared

from core.config import TransferConfig
from core.errors import ConfigurationError
from core.messages.to_rank import Offer
from kv_transfer.channels.choice import TransportChoice, common
from kv_transfer.channels.select import make_connectors

ON_HOST_A = [Offer("shared_memory", "a"), Offer("tcp", ""), Offer("gloo", "")]
ON_HOST_B = [Offer("gloo", ""), Offer("shared_memory", "b"), Offer("tcp", "")]


def kinds_of(connectors) -> list[str]:
    for connector in connectors:
        connector.close()
    return [connector.kind for connector in connectors]


def test_ranks_of_one_host_share_memory_and_those_of_two_do_not():
    assert common(ON_HOST_A, ON_HOST_A) == ["shared_memory", "tcp", "gloo"]
    assert common(ON_HOST_A, ON_HOST_B) == ["tcp", "gloo"]
    assert common(ON_HOST_B, ON_HOST_A) == ["gloo", "tcp"]  # each receiver by its own order
    assert common(ON_HOST_A, [Offer("nccl", "")]) == []


def test_by_order_the_first_in_common_is_taken_until_it_fails_to_that_peer():
    choice = TransportChoice(["cuda_ipc", "nccl"], 0)
    assert choice.offers("a:1") == ("cuda_ipc", "nccl")
    choice.failed("a:1", "cuda_ipc")
    assert choice.offers("a:1") == ("nccl", "cuda_ipc")
    assert choice.offers("a:2") == ("cuda_ipc", "nccl"), "another GPU of that host may be reachable"
    choice.failed("a:1", "nccl")
    assert choice.offers("a:1") == ("cuda_ipc", "nccl"), "when nothing works it was the peer"
    choice.moved("a:1", "cuda_ipc", 2**30, 1.0)
    assert not choice.is_spent("a:1", "cuda_ipc")


def test_by_trial_each_moves_some_slabs_and_the_fastest_stays_for_the_whole_host():
    choice = TransportChoice(["shared_memory", "nixl", "tcp"], 100)
    choice.taken("a:1", choice.offers("a:1"), "nixl")  # the peer is on another host: no memory in common
    choice.moved("a:1", "nixl", 60, 1.0)
    assert not choice.is_spent("a:1", "nixl")
    choice.moved("a:1", "nixl", 60, 1.0)
    assert choice.is_spent("a:1", "nixl")
    assert choice.offers("a:1") == ("tcp",)
    choice.moved("a:1", "tcp", 120, 0.5)
    assert not choice.is_spent("a:1", "tcp")
    assert choice.is_spent("a:2", "nixl")
    assert choice.offers("a:2") == ("tcp", "nixl")
    assert choice.offers("b:1") == ("shared_memory", "nixl", "tcp")


def test_by_trial_what_fails_loses_however_quickly():
    choice = TransportChoice(["nixl", "tcp"], 100)
    choice.failed("a:1", "nixl")
    assert choice.offers("a:1") == ("tcp",)
    choice.moved("a:1", "tcp", 100, 9.0)
    assert choice.offers("a:1") == ("tcp", "nixl")
    assert not choice.is_spent("a:1", "tcp")


def test_auto_prefers_shared_memory_to_what_crosses_hosts(tmp_path):
    pool = random_pools(layout_of(), 4, 0)[0]
    assert kinds_of(make_connectors(TransferConfig(), HOST, pool)) == ["tcp"]
    mapped = shared(pool, tmp_path)
    path = next(tmp_path.iterdir())
    connectors = make_connectors(TransferConfig(), HOST, mapped, path)
    assert [connector.reach == "" for connector in connectors] == [False, True]
    assert kinds_of(connectors) == ["shared_memory", "tcp"]


def test_memory_is_not_shared_with_containers_whose_processes_have_other_numbers(tmp_path):
    mapped = shared(random_pools(layout_of(), 4, 0)[0], tmp_path)
    (connector,) = make_connectors(TransferConfig(channel="shared_memory"), HOST, mapped, next(tmp_path.iterdir()))
    assert connector.reach.endswith(f"pid:{Path('/proc/self/ns/pid').stat().st_ino}")


def test_measured_leaves_out_what_does_not_work_here(caplog):
    caplog.set_level(logging.INFO)
    kinds = kinds_of(make_connectors(TransferConfig(channel="measured"), HOST, random_pools(layout_of(), 4, 0)[0]))
    assert "gloo" in kinds and "shared_memory" not in kinds
    assert "no channels of kind shared_memory: channel shared_memory needs a KV pool in shared memory" in caplog.text


def test_no_channel_at_all_is_the_operators_fault():
    pool = random_pools(layout_of(), 4, 0)[0]
    with pytest.raises(ConfigurationError, match="works on no-such-host"):
        make_connectors(TransferConfig(connect_timeout_s=0.2), "no-such-host", pool)


@pytest.mark.parametrize(
    ("channel", "says"),
    [("nccl", "cannot carry a pool on cpu"), ("cuda_ipc", "cannot carry"), ("shared_memory", "in shared memory")],
)
def test_a_named_kind_that_does_not_work_is_refused(channel, says):
    with pytest.raises(ConfigurationError, match=says) as raised:
        make_connectors(TransferConfig(channel=channel), HOST, torch.zeros(1, 2, 2, 1, 4, 8))
    assert raised.value.field == "channel"
