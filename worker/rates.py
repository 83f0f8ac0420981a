"""Moving averages of what a replica achieves."""


class MovingAverage:
    """Exponentially weighted mean; the first sample counts fully."""

    def __init__(self, weight: float = 0.1) -> None:
        self.value = 0.0
        self._weight = weight
        self._has_samples = False

    def add(self, sample: float) -> None:
        """Takes one sample in."""
        self.value = self.value + self._weight * (sample - self.value) if self._has_samples else sample
        self._has_samples = True
