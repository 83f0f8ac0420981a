"""Equal machines share one fit; how much slower than the others each of them is, is told apart. Pure."""

from collections.abc import Sequence
from math import exp

from cluster.scheduler.robust_fit import RobustFit

MEMBER_MEMORY = 50  # samples that a member's own factor goes by


class ClassFit:
    """seconds = factor of the member * fit of the class. Factors are 1 in the geometric mean."""

    def __init__(self, prior: Sequence[float]) -> None:
        self.fit = RobustFit(prior)
        self._logs: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._sum_logs = 0.0

    def __len__(self) -> int:
        return len(self._logs)

    def factor(self, member: str) -> float:
        """1 of one that nothing is known of."""
        return exp(self._relative(member)) if member in self._logs else 1.0

    def predict(self, member: str, features: Sequence[float]) -> float:
        """Seconds."""
        return self.factor(member) * self.fit.predict(features)

    def add(self, member: str, features: Sequence[float], seconds: float) -> None:
        """Takes one observation of a member in."""
        relative = self._relative(member) if member in self._logs else 0.0
        usual = seconds / exp(relative)
        if len(self._logs) > 1 or member not in self._logs:
            self._learn(member, relative + (self.fit.deviation(features, usual) if self._logs else 0.0))
            usual = seconds / exp(self._relative(member))
        self.fit.add(features, usual)

    def remove(self, member: str) -> None:
        """It is gone; idempotent."""
        self._sum_logs -= self._logs.pop(member, 0.0)
        self._counts.pop(member, None)

    def _learn(self, member: str, goal: float) -> None:
        """Moves the member's factor, among the others', towards `goal`."""
        known = self._logs.get(member)
        if known is None:
            # such that it stands at its goal among those that are there already
            start = goal + self._sum_logs / len(self._logs) if self._logs else 0.0
            self._logs[member], self._counts[member] = start, 1
            self._sum_logs += start
            return
        self._counts[member] = count = min(self._counts[member] + 1, MEMBER_MEMORY)
        step = (goal - self._relative(member)) / count
        self._logs[member] = known + step
        self._sum_logs += step

    def _relative(self, member: str) -> float:
        return self._logs[member] - self._sum_logs / len(self._logs)
