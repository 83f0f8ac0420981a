"""Who was served how much: a virtual token counter for each tenant. Pure.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): the waiting tenant with the least service goes
next, counted in tokens over its weight. Who comes back after a pause is lifted to those who wait, so that nobody saves
up service; what a request takes is charged when it is taken, its output by what is expected, and put right at its end.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

OUTPUT_WEIGHT = 2.0  # of an output token, in prompt tokens, as in the paper
MOST_UNSETTLED = 1024  # attempts that may be followed by others
MOST_TENANTS = 4096  # counters kept; the lowest ones, which lifting makes anew, go first


@dataclass(frozen=True)
class _Charge:
    tenant: str
    num_prompt_tokens: float
    num_output_tokens: float  # expected

    @property
    def num_tokens(self) -> float:
        """What was charged, in prompt tokens."""
        return self.num_prompt_tokens + OUTPUT_WEIGHT * self.num_output_tokens


class FairShare:
    """Counters and charges; tenants that no weight names have weight 1."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._served: dict[str, float] = {}
        self._charges: dict[str, _Charge] = {}  # by request
        self._unsettled: dict[str, _Charge] = {}  # of attempts that ended in the middle, the newest last
        self._last_turn: dict[str, int] = {}
        self._num_turns = 0
        self._level = 0.0  # of the tenant that was served last

    def weight(self, tenant: str) -> float:
        """Its part of the fleet is its weight over those of all who want more than their part."""
        return self._weights.get(tenant, 1.0)

    def served(self, tenant: str) -> float:
        """Prompt tokens' worth of service over weight; only differences mean something."""
        return self._served.get(tenant, 0.0)

    def turn(self, tenant: str) -> tuple[float, int]:
        """The least one goes next: who was served least, of those the one whose last turn is longest ago."""
        return self.served(tenant), self._last_turn.get(tenant, 0)

    def arrived(self, tenant: str, waiting: Collection[str]) -> None:
        """A tenant begins to wait, beside those who do: it does not go before them for having been away."""
        floor = min((self.served(other) for other in waiting), default=self._level)
        self._served[tenant] = max(self.served(tenant), floor)
        if len(self._served) > MOST_TENANTS:
            keep = sorted(self._served, key=self.served, reverse=True)[: MOST_TENANTS // 2]
            self._served = {name: self._served[name] for name in {*keep, *waiting, tenant} if name in self._served}
            self._last_turn = {name: turn for name, turn in self._last_turn.items() if name in self._served}

    def taken(self, request_id: str, tenant: str, num_prompt_tokens: float, num_output_tokens: float) -> None:
        """A request of a tenant is served from now on: prompt tokens to compute, output tokens that are expected."""
        before = self._charges.pop(request_id, None) or self._unsettled.pop(request_id, None)
        if before is not None:  # an attempt that failed or yielded: whoever has to answer again takes nothing twice
            self._charge(before.tenant, -before.num_tokens)
        charge = self._charges[request_id] = _Charge(tenant, num_prompt_tokens, num_output_tokens)
        self._level = max(self._level, self.served(tenant))
        self._num_turns += 1
        self._last_turn[tenant] = self._num_turns
        self._charge(tenant, charge.num_tokens)

    def ended(self, request_id: str, num_output_tokens: float | None) -> None:
        """It is over after so many output tokens, over all attempts; None: nobody knows, so what was expected stands
        unless it is served again.
        """
        charge = self._charges.pop(request_id, None)
        if charge is None:
            return
        if num_output_tokens is not None:
            self._charge(charge.tenant, OUTPUT_WEIGHT * (num_output_tokens - charge.num_output_tokens))
            return
        self._unsettled[request_id] = charge
        if len(self._unsettled) > MOST_UNSETTLED:
            del self._unsettled[next(iter(self._unsettled))]

    def _charge(self, tenant: str, num_tokens: float) -> None:
        self._served[tenant] = self.served(tenant) + num_tokens / self.weight(tenant)
