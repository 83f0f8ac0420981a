"""What the stages of a replica say to each other, and the trivial pipeline of a single stage.

    first stage   -- orders, activations -->   next stage   -- orders, activations -->   last stage
        ^--- reports: layers that are written -----'                                          |
        ^--- reports: layers that are written, the end of a step, the tokens it drew ---------'

Every rank has the same part of the stages before and after its own (see core.kv_layout) for neighbours; what a stage
reports goes from its first rank to the replica's first rank.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Pipeline(Protocol):
    """One rank's links to other stages. Sending never waits for the receiver to be ready. All raise PeerLost.

    Each direction of each link belongs to one thread at a time, and keeps its order.
    """

    stage: int
    num_stages: int

    def pass_on(self, orders: list[int], *, wait: bool = False) -> None:
        """64-bit integers for the next stage; of no effect on the last. `wait`: until they arrived."""
        ...

    def orders(self, timeout_s: float | None = None) -> list[int]:
        """Those of the stage before, awaited at most so long."""
        ...

    def send(self, hidden: Tensor) -> None:
        """Activations to the next stage, which are not changed afterwards."""
        ...

    def receive(self, hidden: Tensor) -> None:
        """Fills a tensor of equal shape and dtype with activations of the stage before."""
        ...

    def report(self, tensors: Sequence[Tensor]) -> None:
        """Tensors in host memory to the replica's first rank, from the first rank of a later stage."""
        ...

    def reported(self, stage: int, tensors: Sequence[Tensor]) -> None:
        """Fills tensors of equal shapes and dtypes with what the first rank of a later stage reports."""
        ...

    def close(self) -> None:
        """Leaves; the neighbours' next call raises PeerLost."""
        ...


class SingleStage:
    """The pipeline of a replica whose ranks all have every layer."""

    stage = 0
    num_stages = 1

    def pass_on(self, orders: list[int], *, wait: bool = False) -> None:
        """See Pipeline."""

    def orders(self, timeout_s: float | None = None) -> list[int]:
        """There is no stage before."""
        raise AssertionError(f"no stage before gives orders within {timeout_s} s")

    def send(self, hidden: Tensor) -> None:
        """There is no next stage."""
        raise AssertionError(f"no next stage takes {tuple(hidden.shape)}")

    def receive(self, hidden: Tensor) -> None:
        """There is no stage before."""
        raise AssertionError(f"no stage before sends {tuple(hidden.shape)}")

    def report(self, tensors: Sequence[Tensor]) -> None:
        """There is no later stage."""
        raise AssertionError(f"no later stage reports {len(tensors)} tensors")

    def reported(self, stage: int, tensors: Sequence[Tensor]) -> None:
        """There is no later stage."""
        raise AssertionError(f"stage {stage} reports no {len(tensors)} tensors")

    def close(self) -> None:
        """See Pipeline."""
