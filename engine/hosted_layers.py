"""Layers on their way into host memory while a model is loaded, and the stream that brings them back."""

from typing import Generic

import torch

from engine.layer_images import HostImage
from engine.taken_apart import Skeleton, Whole, take_apart
from engine.weight_stream import WeightStream, make_copier


class HostedLayers(Generic[Whole]):
    """In the order in which they are computed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._images: list[HostImage] = []
        self._skeletons: list[Skeleton[Whole]] = []

    def __len__(self) -> int:
        return len(self._images)

    def add(self, layer: Whole) -> Whole:
        """The layer in host memory; the one that was given may go. Raises ConfigurationError for want of memory."""
        skeleton, tensors = take_apart(layer)
        image = HostImage(tensors, self._device)
        self._images.append(image)
        self._skeletons.append(skeleton)
        return skeleton.over(image.views(image.memory))

    def stream(self) -> tuple[WeightStream, list[Whole]]:
        """What brings the layers, and the layers as they are when they have come."""
        stream = WeightStream(self._images, self._device, make_copier(self._device))
        return stream, [skeleton.over(stream.on_device(number)) for number, skeleton in enumerate(self._skeletons)]
