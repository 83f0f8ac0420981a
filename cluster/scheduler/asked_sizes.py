"""How many replicas autoscalers have asked for, each for the pools of its generation. Pure."""

from collections.abc import Mapping

from cluster.autoscaling.signals import PoolTarget
from core.messages.fleet import Role

Asked = Mapping[Role, PoolTarget]


class AskedSizes:
    """What an autoscaler says holds until it is due again: one that has ended is forgotten."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[float, Asked]] = {}

    def ask(self, generation: str, asked: Asked, until: float) -> None:
        """The sizes of a generation's pools, until it is said again or `until`."""
        self._asked[generation] = until, asked

    def at(self, now: float) -> dict[str, Asked]:
        """Sizes by generation."""
        return {generation: asked for generation, (until, asked) in self._asked.items() if until > now}
