"""A line through timings that keeps up: linear least squares with forgetting, against outliers, towards a prior. Pure.

seconds = sum of c_i * feature_i with c_i >= 0. Every feature is scaled by its prior coefficient p_i, so that what is
fitted are factors g_i = c_i / p_i around one common factor, and errors count relative to the seconds predicted:

    minimise  sum over samples k of  forgetting^age * ((z_k . g - y_k)^2  +  prior * |z_k * (g - common)|^2)
    z_k = p * features / predicted,   y_k = observed / predicted, no further from 1 than the noise allows

which is recursive least squares with exponential forgetting in its information form (Ljung, System Identification,
ch. 11), with the influence of outliers bounded as by Huber (1964). The prior keeps directions that the load does not
excite from drifting. The noise that is allowed for grows while samples stay far off; while they stay off to one side,
what was seen before is taken to have changed by that much, too, and is forgotten faster: so a change is followed.
"""

from collections.abc import Sequence
from math import exp, log

CLIP = 3.0  # deviations beyond which a sample's pull grows no more
LEAST_NOISE = 0.02  # of log seconds: timings agree no better than this
NOISE_WEIGHT = 0.05  # of one sample in the noise
NUM_FREE = 8  # first samples, which nothing is clipped of
BIAS_WEIGHT = 0.1  # of one sample in the mean deviation, in which none counts for more than the noise
BIASED = 0.6  # mean over mean absolute deviation from which on the past counts as over; noise alone stays below
BIAS_KEPT = 0.5  # after it was acted upon
BIASED_FORGETTING = 0.9
FAR = 1.0  # of log seconds: samples further off are weighed by what was observed, not by what was predicted
SOLVE_EVERY = 8  # samples, once there are twice as many
LEAST_WEIGHT = 1e-12  # of the prior, for features that were always 0


class RobustFit:
    """`coefficients` are always usable: those of the prior before the first sample."""

    def __init__(self, prior: Sequence[float], forgetting: float = 0.997, prior_weight: float = 0.003) -> None:
        """`prior` coefficients are positive, in seconds per feature."""
        size = len(prior)
        self.coefficients = tuple(prior)
        self.num_samples = 0
        self.noise = 0.3  # mean absolute deviation of log seconds
        self._prior = tuple(prior)
        self._bias = 0.0  # mean deviation of log seconds
        self._common = 1.0
        self._forgetting = forgetting
        self._prior_weight = prior_weight
        self._information = [[0.0] * size for _ in range(size)]
        self._moment = [0.0] * size
        self._num_unsolved = 0

    def predict(self, features: Sequence[float]) -> float:
        """Seconds."""
        return sum(c * x for c, x in zip(self.coefficients, features, strict=True))

    def clipped(self, deviation: float) -> float:
        """Of a logarithm of seconds: no further from 0 than noise explains."""
        if self.num_samples < NUM_FREE:
            return deviation
        limit = CLIP * self.noise
        return max(-limit, min(limit, deviation))

    def add(self, features: Sequence[float], seconds: float) -> None:
        """Takes one observation in; `seconds` are positive."""
        predicted = max(self.predict(features), 1e-9)
        found = log(seconds / predicted)
        used = self.clipped(found)
        limit = max(3 * CLIP * self.noise, 0.1)
        self.noise = max(LEAST_NOISE, self.noise + NOISE_WEIGHT * (min(abs(found), limit) - self.noise))
        self._bias += BIAS_WEIGHT * (max(-self.noise, min(self.noise, found)) - self._bias)  # much like a sign
        forgetting = self._forgetting
        if abs(self._bias) > BIASED * self.noise and self.num_samples > NUM_FREE:
            forgetting = BIASED_FORGETTING
            self._rescale(exp(self._bias))
        self.num_samples += 1
        if self.num_samples <= NUM_FREE:
            of_prior = log(seconds / max(sum(p * x for p, x in zip(self._prior, features, strict=True)), 1e-9))
            self._common *= exp((of_prior - log(self._common)) / self.num_samples)  # their geometric mean
        target = predicted * exp(used)
        scale = predicted if abs(used) < FAR else target
        row = [p * x / scale for p, x in zip(self._prior, features, strict=True)]
        goal = target / scale
        for i, z in enumerate(row):
            self._moment[i] = forgetting * self._moment[i] + z * goal
            mine = self._information[i]
            for j, other in enumerate(row):
                mine[j] = forgetting * mine[j] + z * other
        self._num_unsolved += 1
        if self._num_unsolved >= SOLVE_EVERY or self.num_samples <= 2 * SOLVE_EVERY:
            self._solve()

    def _rescale(self, factor: float) -> None:
        """All that was seen would take so much longer now."""
        self._moment = [factor * moment for moment in self._moment]
        self._common *= factor
        self._bias *= BIAS_KEPT

    def _solve(self) -> None:
        """Without the features that would get a negative coefficient; they cost nothing then."""
        self._num_unsolved = 0
        used = list(range(len(self._prior)))
        factors: list[float] = []
        while used:
            weights = {i: self._prior_weight * self._information[i][i] + LEAST_WEIGHT for i in used}
            rows = [
                [self._information[i][j] + (weights[i] if i == j else 0.0) for j in used]
                + [self._moment[i] + weights[i] * self._common]
                for i in used
            ]
            factors = _solved(rows)
            worst = min(range(len(used)), key=factors.__getitem__)
            if factors[worst] >= 0:
                break
            del used[worst]
        found = dict(zip(used, factors, strict=True))
        self.coefficients = tuple(p * found.get(i, 0.0) for i, p in enumerate(self._prior))


def _solved(rows: list[list[float]]) -> list[float]:
    """Solution of a symmetric positive definite system given as [A | b], by elimination."""
    size = len(rows)
    for i in range(size):
        pivot = rows[i]
        for below in rows[i + 1 :]:
            factor = below[i] / pivot[i]
            for j in range(i, size + 1):
                below[j] -= factor * pivot[j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - rest) / rows[i][i]
    return solution
