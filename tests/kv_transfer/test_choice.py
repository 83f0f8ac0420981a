"""Which transports a rank offers, and which one two ranks take."""

import logging

import pytest
import torch
from transfer_fleet import HOST, layout_of, random_pools, shared

from core.config import TransferConfig
from core.errors import ConfigurationError, TransferFailed
from core.messages.to_rank import Offer
from kv_transfer.channels.choice import MeasuredChoice, Probe, common
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


def test_the_fastest_kind_wins_and_the_first_of_equals():
    slow, fast, equal = Probe("gloo", 2**24, 0.02), Probe("tcp", 2**24, 0.005), Probe("nixl", 2**23, 0.0025)
    assert MeasuredChoice().conclude("b", [slow, fast, equal]) == "tcp"
    assert MeasuredChoice().conclude("b", [slow, equal, fast]) == "nixl"
    assert fast.bytes_per_s == 2**24 / 0.005


def test_a_kind_that_failed_loses_however_quickly():
    choice = MeasuredChoice()
    assert choice.conclude("b", [Probe("shared_memory", 0, 0.0), Probe("gloo", 1, 10.0)]) == "gloo"
    with pytest.raises(TransferFailed, match="no channel to b works, of gloo, tcp"):
        choice.conclude("b", [Probe("gloo", 0, 1.0), Probe("tcp", 0, 1.0)])
    with pytest.raises(TransferFailed, match="of none"):
        choice.conclude("b", [])


def test_a_host_is_measured_once_per_set_of_kinds():
    choice = MeasuredChoice()
    assert choice.winner("b", ["tcp", "gloo"]) is None
    choice.conclude("b", [Probe("tcp", 2**20, 0.002), Probe("gloo", 2**20, 0.001)])
    assert choice.winner("b", ["tcp", "gloo"]) == "gloo"
    assert choice.winner("b", ["shared_memory", "tcp", "gloo"]) is None  # another rank of b can do more
    assert choice.winner("c", ["tcp", "gloo"]) is None
    assert choice.winner("c", ["tcp"]) == "tcp"  # nothing to measure
    choice.forget("b")
    assert choice.winner("b", ["tcp", "gloo"]) is None


def test_auto_prefers_shared_memory_to_what_crosses_hosts(tmp_path):
    pool = random_pools(layout_of(), 4, 0)[0]
    assert kinds_of(make_connectors(TransferConfig(), HOST, pool)) == ["tcp"]
    mapped = shared(pool, tmp_path)
    path = next(tmp_path.iterdir())
    connectors = make_connectors(TransferConfig(), HOST, mapped, path)
    assert [connector.reach == "" for connector in connectors] == [False, True]
    assert kinds_of(connectors) == ["shared_memory", "tcp"]


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
