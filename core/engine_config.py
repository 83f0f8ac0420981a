"""How the engine of a pool's ranks computes: by which library, from graphs, with weights in host memory."""

from typing import Literal

from pydantic import Field, field_validator

from core.section import Section

Library = Literal["auto", "torch", "flashinfer"]


class EngineConfig(Section):
    """`auto` takes FlashInfer on CUDA where it is installed and can compute the model, torch elsewhere."""

    attention: Library = "auto"
    kernels: Library = "auto"  # norms, rotations, activations
    graph_batch_sizes: tuple[int, ...] | None = None  # of decode steps; None: 1, 2, 4 ... max_num_seqs; (): no graphs
    device_weights_mib: int | None = Field(default=None, ge=1)  # per rank; layers beyond it stream in from the host

    @field_validator("graph_batch_sizes")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sizes and (sizes[0] < 1 or sorted(set(sizes)) != list(sizes)):
            raise ValueError(f"batch sizes {list(sizes)} must ascend from 1 or more")
        return sizes

    def graph_ladder(self, max_num_seqs: int) -> tuple[int, ...]:
        """Batch sizes to record, none beyond what a step can hold."""
        if self.graph_batch_sizes is not None:
            return tuple(size for size in self.graph_batch_sizes if size <= max_num_seqs)
        doubling = (1 << power for power in range(max_num_seqs.bit_length()))
        return tuple(sorted({*doubling, max_num_seqs}))

    @property
    def device_weight_bytes(self) -> int | None:
        """None: all weights stay on the device."""
        return None if self.device_weights_mib is None else self.device_weights_mib << 20
