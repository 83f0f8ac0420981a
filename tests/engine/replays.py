"""Recording without CUDA: the work is computed anew, and must read nothing but what it read when it was recorded.

A CUDA graph reads the memory that it was recorded over, whatever Python has made since. So a replay notes the memory
that its operations take from outside, and fails when there is any that the recording had not.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.kv_layout import KVLayout
from engine.backend import Backend
from engine.flashinfer_attention import FlashInferAttention
from engine.flashinfer_kernels import FlashInferKernels
from engine.flashinfer_latents import FlashInferLatentAttention
from engine.recording import Record, Work
from tests.engine import plain_flashinfer


class _Outside(TorchDispatchMode):
    """Addresses of memory that operations read or write, but for what they made themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self._made: list[Tensor] = []  # alive, so that no address is used twice

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = {tensor.untyped_storage().data_ptr() for tensor in self._made}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.numel():
                address = leaf.untyped_storage().data_ptr()
                if address not in made:
                    self.seen.add(address)
        result = operation(*args, **kwargs or {})
        before = self.seen
        self._made += [
            leaf
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor)
            and leaf.layout == torch.strided
            and leaf.untyped_storage().data_ptr() not in before
        ]
        return result


class Replay:
    """A Recording that only computes anew."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.num_replays = 0

    def replay(self) -> Tensor | None:
        self.num_replays += 1
        return self._work()


class StrictReplay(Replay):
    """One that checks what is read. Not of experts, which on a CPU are read as they are chosen, nor of several ranks,
    which here read each other's memory.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        with _Outside() as outside:
            work()
        self._recorded = outside.seen

    def replay(self) -> Tensor | None:
        with _Outside() as outside:
            result = super().replay()
        assert outside.seen <= self._recorded, "a graph would not read what was made after it was recorded"
        return result


def plain_flashinfer_backend(
    graph_sizes: tuple[int, ...] = (), record: Record = StrictReplay
) -> Callable[[KVLayout], Backend]:
    """FlashInfer's part computed by torch; with sizes, decode steps are recorded."""

    def make(layout: KVLayout) -> Backend:
        attention = FlashInferLatentAttention if layout.latent else FlashInferAttention
        return Backend(
            FlashInferKernels(plain_flashinfer),
            partial(attention, plain_flashinfer),
            graph_sizes,
            record if graph_sizes else None,
        )

    return make
