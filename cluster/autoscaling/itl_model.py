"""Learns how a decode step's time grows with the batch."""

WEIGHT = 0.02  # of one sample: the last fifty or so count
LEAST_SPREAD = 0.05  # relative deviation of the batches seen, below which a slope would be a guess


class ItlModel:
    """Least squares of itl = base + slope * batch, older samples fading.

    In proportion alone (itl ~ batch) a pool could never shrink: the base, reading the weights once a step, stays.
    """

    def __init__(self) -> None:
        self._batch = self._itl = self._batch_squared = self._product = 0.0
        self._has_samples = False

    def add(self, batch: float, itl_s: float) -> None:
        """One observation: requests per replica, seconds per step."""
        weight = WEIGHT if self._has_samples else 1.0
        self._batch += weight * (batch - self._batch)
        self._itl += weight * (itl_s - self._itl)
        self._batch_squared += weight * (batch * batch - self._batch_squared)
        self._product += weight * (batch * itl_s - self._product)
        self._has_samples = True

    def batch_within(self, itl_s: float) -> float | None:
        """The largest batch whose step takes at most `itl_s`, at least 1; None while too little was seen."""
        variance = self._batch_squared - self._batch**2
        if variance < (LEAST_SPREAD * self._batch) ** 2 or not self._batch:
            return None
        slope = (self._product - self._batch * self._itl) / variance
        if slope <= 0:
            return None
        base_s = max(0.0, self._itl - slope * self._batch)
        return max(1.0, (itl_s - base_s) / slope)
