"""Transports of the data plane by name: whose pools they carry, and which of them a rank offers to its peers."""

from typing import Literal

Device = Literal["cpu", "cuda"]
ChannelKind = Literal["auto", "measured", "gloo", "tcp", "nccl", "shared_memory", "cuda_ipc", "nixl"]

_DEVICES: dict[ChannelKind, tuple[Device, ...]] = {
    "gloo": ("cpu",),
    "tcp": ("cpu",),
    "shared_memory": ("cpu",),
    "nccl": ("cuda",),
    "cuda_ipc": ("cuda",),
    "nixl": ("cpu", "cuda"),
}
_OFFERED: dict[ChannelKind, dict[Device, tuple[ChannelKind, ...]]] = {  # in order of preference
    "auto": {"cpu": ("shared_memory", "tcp"), "cuda": ("cuda_ipc", "nccl")},
    "measured": {"cpu": ("shared_memory", "nixl", "tcp", "gloo"), "cuda": ("cuda_ipc", "nixl", "nccl")},
}


def offered_kinds(channel: ChannelKind, device: Device) -> tuple[ChannelKind, ...]:
    """What `transfer.channel` stands for on a device, in order of preference; empty when it carries no such pools."""
    if channel in _OFFERED:
        return _OFFERED[channel][device]
    return (channel,) if device in _DEVICES[channel] else ()
