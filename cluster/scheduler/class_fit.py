"""Equal machines share one fit; how much slower than usual each of them is, is told apart. Pure."""

from collections.abc import Sequence
from math import exp, log

from cluster.scheduler.robust_fit import RobustFit

MEMBER_MEMORY = 50  # samples that a member's own factor goes by
NUM_FREE = 4  # first samples of a member, which nothing is clipped of: it may be of any speed
CENTRE_WEIGHT = 0.001  # of the members' mean in what is usual, with each sample: the fit can follow


class ClassFit:
    """seconds = factor of the member * fit of the class. In the long run the geometric mean of the factors is 1."""

    def __init__(self, prior: Sequence[float]) -> None:
        self.fit = RobustFit(prior)
        self._logs: dict[str, float] = {}  # of factors, `_usual` above what they are
        self._counts: dict[str, int] = {}
        self._sum_logs = 0.0
        self._usual = 0.0

    def __len__(self) -> int:
        return len(self._logs)

    def factor(self, member: str) -> float:
        """1 of one that nothing is known of."""
        return exp(self._logs.get(member, self._usual) - self._usual)

    def predict(self, member: str, features: Sequence[float]) -> float:
        """Seconds."""
        return self.factor(member) * self.fit.predict(features)

    def add(self, member: str, features: Sequence[float], seconds: float) -> None:
        """Takes one observation of a member in."""
        self._learn(member, features, seconds)
        self.fit.add(features, seconds / self.factor(member))

    def remove(self, member: str) -> None:
        """It is gone; idempotent."""
        self._sum_logs -= self._logs.pop(member, 0.0)
        self._counts.pop(member, None)

    def _learn(self, member: str, features: Sequence[float], seconds: float) -> None:
        """Moves the member's factor. One alone is what is usual."""
        known = self._logs.get(member)
        if known is None:
            known = self._logs[member] = self._usual
            self._counts[member] = 0
            self._sum_logs += known
        count = self._counts[member] = min(self._counts[member] + 1, MEMBER_MEMORY)
        if len(self._logs) == 1:
            return
        expected = max(self.predict(member, features), 1e-9)
        found = log(seconds / expected) if count <= NUM_FREE else self.fit.clipped(log(seconds / expected))
        self._logs[member] = known + found / count
        self._sum_logs += found / count
        self._usual += CENTRE_WEIGHT * (self._sum_logs / len(self._logs) - self._usual)
