"""What prompts that decode computes take from its batch: the ITL that a sequence there sees on average. Pure.

In a window of W seconds, of which prompts take P in k steps, every sequence gets k tokens with these and (W - P) / step
between them:

    ITL = W / (k + (W - P) / step)
"""

from math import exp

WINDOW_S = 5.0  # older prompts fade: about as long as a short answer takes, whose TPOT has no time to recover


class Stalls:
    """Of one replica."""

    __slots__ = ("_at", "_num_steps", "_seconds")

    def __init__(self) -> None:
        self._seconds = self._num_steps = self._at = 0.0

    def add(self, seconds: float, num_steps: int, now: float) -> None:
        """A prompt has been computed beside its batch."""
        fading = exp((self._at - now) / WINDOW_S)
        self._seconds = self._seconds * fading + seconds
        self._num_steps = self._num_steps * fading + num_steps
        self._at = now
        if self._seconds > WINDOW_S:  # what came before the window is not made up for by its end
            self._num_steps *= WINDOW_S / self._seconds
            self._seconds = WINDOW_S

    def itl_s(self, step_s: float, now: float, more_s: float = 0.0, num_more: int = 0) -> float:
        """Of a batch whose steps take `step_s` without prompts, with others of `more_s` in `num_more` steps."""
        if not self._seconds and not more_s:
            return step_s
        fading = exp((self._at - now) / WINDOW_S)
        seconds, num_steps = self._seconds * fading + more_s, self._num_steps * fading + num_more
        between_s = max(0.0, WINDOW_S - seconds)
        return (seconds + between_s) * step_s / (num_steps * step_s + between_s)
