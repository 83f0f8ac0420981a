"""How the ranks of a replica meet: all at one store, the parts of each stage in a group, stages by their links."""

from dataclasses import dataclass, field

import torch

from core.errors import PeerLost
from core.kv_layout import KVLayout
from engine.orders import STEP
from engine.pipeline import Pipeline, SingleStage
from engine.rank_group import RankGroup, SingleRank
from engine.rank_store import RankStore
from engine.stage_links import StageLinks
from engine.tensor_parallel import TensorParallelGroup


@dataclass(frozen=True)
class RankLinks:
    """One rank's ways to the others."""

    group: RankGroup = field(default_factory=SingleRank)
    pipeline: Pipeline = field(default_factory=SingleStage)

    @property
    def rank(self) -> int:
        """Of the replica."""
        return self.pipeline.stage * self.group.size + self.group.rank

    @property
    def num_ranks(self) -> int:
        """Of the replica."""
        return self.pipeline.num_stages * self.group.size

    def tell(self, values: list[int]) -> None:
        """From the first rank to all others: through its stage, then from stage to stage.

        Returns at once where that is a step to compute, which the next stage takes when it can; else when it has.
        Raises PeerLost, as all do.
        """
        if self.group.size > 1:
            self.group.broadcast(values)
        self.pipeline.pass_on(values, wait=values[0] != STEP)

    def hear(self, timeout_s: float | None = None) -> list[int]:
        """What the first rank tells, on another one, which passes it on."""
        is_first_stage = self.pipeline.stage == 0
        values = self.group.broadcast(None, timeout_s) if is_first_stage else self.pipeline.orders(timeout_s)
        self.pipeline.pass_on(values, wait=values[0] != STEP)
        return values

    def close(self) -> None:
        """Leaves; the others' next call raises PeerLost."""
        self.group.close()
        self.pipeline.close()


def connect_ranks(
    store_address: str,
    rank: int,
    layout: KVLayout,
    device: torch.device,
    host: str = "127.0.0.1",
    timeout_s: float = 30.0,
) -> RankLinks:
    """Meets the other ranks at the store, which the first rank hosts at `store_address` (host:port).

    `host` is this rank's own interface. Raises PeerLost when a rank is missing or silent for `timeout_s`.
    """
    if layout.num_ranks == 1:
        return RankLinks()
    try:
        store = RankStore(store_address, host, timeout_s, hosts=rank == 0)
        group: RankGroup = SingleRank()
        if layout.tensor_parallel > 1:
            name, part = f"stage{layout.stage_of(rank)}", layout.part_of(rank)
            group = TensorParallelGroup(store, name, part, layout.tensor_parallel, device)
        pipeline: Pipeline = SingleStage()
        if layout.pipeline_parallel > 1:
            pipeline = StageLinks(store, rank, layout, device, timeout_s)
    except (RuntimeError, PeerLost) as error:
        raise PeerLost(
            f"rank {rank} of {layout.num_ranks} could not meet the others at {store_address}: {error}"
        ) from error
    return RankLinks(group, pipeline)
