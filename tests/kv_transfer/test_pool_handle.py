"""What a rank tells of its pool so that peers can read it by themselves, and what they refuse."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from transfer_fleet import layout_of, random_pools

from core.errors import ConfigurationError, TransferFailed
from kv_transfer.channels.cuda_ipc import CudaPlace, require_cuda_malloc, require_whole
from kv_transfer.channels.pool_handle import PoolHandle

OURS = random_pools(layout_of(), 24, seed=0)[0]
RAW = bytes([2]) + b"c" + bytes(range(64))
TOLD = PoolHandle.of(OURS, CudaPlace(RAW, OURS.numel() * OURS.element_size(), 512, "GPU-1"))
FLAT = {
    "shape": [3, 24, 2, 4, 4, 8],
    "dtype": "torch.bfloat16",
    "handle": base64.b64encode(RAW).decode(),
    "num_bytes": OURS.numel() * 2,
    "offset_bytes": 512,
    "device": "GPU-1",
}


def test_a_handle_survives_its_rendezvous():
    back = PoolHandle.decode(TOLD.encode(), CudaPlace)
    assert back == TOLD
    assert back.place.handle == RAW
    require_whole(back, OURS)
    assert back.require_fits(OURS).shape == (3, 24, 2, 4, 4, 8)


def test_form_and_place_are_told_side_by_side_and_bytes_as_base64():
    """As every release tells them: a fleet is upgraded replica by replica."""
    assert json.loads(TOLD.encode()) == FLAT
    assert PoolHandle.decode(json.dumps(FLAT), CudaPlace) == TOLD


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "host:1234",
        "{}",
        "[1, 2]",
        '{"handle": "AA=="}',
        json.dumps(FLAT | {"handle": "AA="}),
        json.dumps(FLAT | {"handle": 5}),
        json.dumps(FLAT | {"shape": None}),
        json.dumps(FLAT | {"metadata": ""}),
        json.dumps({name: value for name, value in FLAT.items() if name != "device"}),
    ],
)
def test_what_is_no_handle_is_refused(text):
    with pytest.raises(TransferFailed, match="not the handle"):
        PoolHandle.decode(text, CudaPlace)


def test_only_pools_of_the_same_cells_fit():
    like = replace(TOLD, shape=(3, 7, 2, 1, 4, 8))  # other blocks, other heads
    assert like.require_fits(OURS).shape == (3, 7, 2, 1, 4, 8)
    foreign = [(4, 24, 2, 4, 4, 8), (3, 24, 2, 4, 16, 8), (3, 24, 2, 4, 4, 16), (3, 24, 1, 4, 4, 8), (3, 24)]
    for sizes in foreign:
        with pytest.raises(TransferFailed, match="does not fit"):
            replace(TOLD, shape=sizes).require_fits(OURS)
    with pytest.raises(TransferFailed, match="float16"):
        replace(TOLD, dtype="torch.float16").require_fits(OURS)


def test_a_cuda_allocation_holds_the_whole_pool():
    with pytest.raises(TransferFailed, match="do not hold"):
        require_whole(replace(TOLD, place=replace(TOLD.place, num_bytes=100)), OURS)
    with pytest.raises(TransferFailed, match="does not fit"):
        require_whole(TOLD, torch.empty(3, 24, 2, 4, 16, 8, dtype=torch.bfloat16))


def test_memory_of_an_expandable_segment_is_refused_with_what_to_do():
    require_cuda_malloc(b"\x02c" + bytes(64))
    with pytest.raises(ConfigurationError, match="drop expandable_segments from PYTORCH_CUDA_ALLOC_CONF") as raised:
        require_cuda_malloc(b"\x02e" + bytes(100))
    assert raised.value.field == "channel"


def test_latents_pass_to_latents_alone():
    latents = torch.zeros(3, 24, 1, 1, 4, 8, dtype=torch.bfloat16)
    told = replace(TOLD, shape=(3, 24, 1, 1, 4, 8))
    assert told.require_fits(latents).shape == (3, 24, 1, 1, 4, 8)
    with pytest.raises(TransferFailed, match="does not fit"):
        told.require_fits(OURS)
