"""Two searches of a fixed number of simulations: for the highest rate that passes, for the best configuration. Pure.

Both spend the same on every policy, whatever they find.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

STEP = 1.6  # between rates until one passes and another fails
RAISE = 1.25  # of the rate, from one round of tuning to the next


@dataclass(frozen=True)
class Probe:
    """One simulation: at so many arrivals per second this share of all arrivals was good."""

    rate: float
    share: float


@dataclass(frozen=True)
class Trial:
    """One simulation of tuning: which configuration, in which round."""

    number: int
    round: int
    probe: Probe


class RateSearch:
    """Remembers what was simulated, so that a stricter search begins with what a laxer one knows.

    A rate passes when its share is at least the asked one. Rates go up or down by a factor until a passing one lies
    below a failing one; then the gap is halved, on a scale of logarithms.
    """

    def __init__(self, measure: Callable[[float], float]) -> None:
        self._measure = measure
        self.probes: list[Probe] = []

    def highest(self, share: float, guess: float, budget: int) -> float:
        """The highest rate seen to pass, after so many more simulations; 0 when none did.

        A rate counts only when every lower one that was tried passes too: luck beyond a failure is none.
        """
        for _ in range(budget):
            rate = self._next(share, guess)
            self.probes.append(Probe(rate, self._measure(rate)))
        return self._bounds(share)[0]

    def _bounds(self, share: float) -> tuple[float, float | None]:
        fails = min((probe.rate for probe in self.probes if probe.share < share), default=None)
        passing = [
            probe.rate for probe in self.probes if probe.share >= share and (fails is None or probe.rate < fails)
        ]
        return max(passing, default=0.0), fails

    def _next(self, share: float, guess: float) -> float:
        passes, fails = self._bounds(share)
        if fails is None:
            return passes * STEP if passes else guess
        return sqrt(passes * fails) if passes else fails / STEP


def tune(
    num_configs: int, measure: Callable[[int, float], float], rate: float, share: float, budget: int
) -> list[Trial]:
    """Every configuration at one rate, then those that pass at higher and higher ones, `budget` simulations in all.

    When none passes any more, the best of them is asked again at lower rates, so that the budget is spent in any case.
    """
    trials: list[Trial] = []
    contenders, round_number = list(range(num_configs)), 0
    while len(trials) < budget:
        for number in contenders[: budget - len(trials)]:
            trials.append(Trial(number, round_number, Probe(rate, measure(number, rate))))
        of_round = [trial for trial in trials if trial.round == round_number]
        passed = [trial for trial in of_round if trial.probe.share >= share]
        if passed:
            contenders = [trial.number for trial in sorted(passed, key=lambda trial: -trial.probe.share)]
            rate *= RAISE
        else:
            contenders = [best_of(trials, share)]
            rate /= RAISE
        round_number += 1
    return trials


def best_of(trials: Sequence[Trial], share: float) -> int:
    """The configuration that passed at the highest rate; of several that of the largest share at the highest rate that
    all of them were tried at; when none passed anywhere that of the largest share; then the first.
    """
    passed = [trial for trial in trials if trial.probe.share >= share]
    if not passed:
        return max(trials, key=lambda trial: (trial.probe.share, -trial.number)).number
    highest = max(trial.probe.rate for trial in passed)
    finalists = {trial.number for trial in passed if trial.probe.rate == highest}
    tried = {number: {t.probe.rate: t.probe.share for t in trials if t.number == number} for number in finalists}
    common = max(rate for rate in tried[min(finalists)] if all(rate in rates for rates in tried.values()))
    return max(finalists, key=lambda number: (tried[number][common], -number))
