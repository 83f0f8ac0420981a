"""How far predictions were from what came, relative to it: the latest ones. Pure."""

from collections import deque

from core.messages.to_scheduler import RelativeError

KEPT = 512


class Accuracy:
    """Of one quantity."""

    def __init__(self, quantity: str) -> None:
        self._quantity = quantity
        self._errors: deque[float] = deque(maxlen=KEPT)
        self._num_samples = 0

    def add(self, predicted_s: float, actual_s: float) -> None:
        """One prediction and what came of it; an actual time of 0 says nothing."""
        if actual_s > 0:
            self._errors.append(abs(predicted_s - actual_s) / actual_s)
            self._num_samples += 1

    def summary(self) -> RelativeError:
        """Zeros while nothing has come."""
        ordered = sorted(self._errors)
        if not ordered:
            return RelativeError(self._quantity, 0, 0.0, 0.0)
        last = len(ordered) - 1
        median, p95 = ordered[round(0.5 * last)], ordered[round(0.95 * last)]
        return RelativeError(self._quantity, self._num_samples, median, p95)
