"""How long one thread may work in another's stead: a share of its time, saved up to a limit. Pure."""

from dataclasses import dataclass


@dataclass
class BorrowedTime:
    """Begins full; `begun_at` and `ended_at` of one spender never go back."""

    share: float  # of all time, in the long run
    most_s: float  # saved at most, and about what may be spent at a stretch
    _saved_s: float = 0.0
    _seen_at: float = float("-inf")

    def is_left(self, now: float) -> bool:
        """Whether anything is saved; what is spent then may exceed it, and is made up for later."""
        saved_s = self._saved_s + self.share * (now - self._seen_at)
        self._saved_s, self._seen_at = min(self.most_s, saved_s), now
        return self._saved_s > 0

    def spend(self, begun_at: float, ended_at: float) -> None:
        """Work was done."""
        self._saved_s -= ended_at - begun_at
