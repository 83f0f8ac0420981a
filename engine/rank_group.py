"""What the ranks of one replica need of each other, and the trivial group of a single rank."""

from typing import Protocol

from torch import Tensor


class RankGroup(Protocol):
    """Collectives within a replica; every rank calls them in the same order. All raise PeerLost."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank; may reuse `tensor`."""
        ...

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """[N, size * C] from every rank's [N, C], on the first rank; None elsewhere."""
        ...

    def broadcast(self, values: list[int] | None, timeout_s: float | None = None) -> list[int]:
        """The first rank's 64-bit integers, on every rank; others pass None, and how long they wait at most."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...


class SingleRank:
    """The group of a replica that is not split."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See RankGroup."""
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """See RankGroup."""
        return tensor

    def broadcast(self, values: list[int] | None, timeout_s: float | None = None) -> list[int]:  # noqa: ARG002
        """See RankGroup."""
        assert values is not None
        return values

    def close(self) -> None:
        """See RankGroup."""
