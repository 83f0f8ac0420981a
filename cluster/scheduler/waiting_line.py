"""Requests without a plan, in the order in which they shall get one. Pure.

1. batch after everything else
2. who is in the middle of an answer before those of whom nothing is shown
3. the tenant that has been served least goes next
4. of one tenant: who was planned before, then higher priority, then those that were not put off, then the first token
   that is due first, then the first to come
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf

from cluster.scheduler.fair_share import FairShare
from core.messages.to_scheduler import Reserve

Place = tuple[bool, bool, bool, int, bool, float, int]  # within a tenant's requests


@dataclass(eq=False)
class Waiting:
    """One request."""

    request: Reserve
    since: float
    due_at: float  # when its first token should be out
    timeout_s: float  # it waits no longer
    is_put_off: bool = False  # its first token cannot be out when it is due, or others' could not
    num_cached_blocks: int = 0  # leading ones that somebody had
    looked_up_at: float = -inf  # when that was
    kept_id: str = ""  # the decode replica that is kept for it
    number: int = field(default_factory=count().__next__)

    @property
    def is_batch(self) -> bool:
        """Others go first."""
        return self.request.is_batch

    def misses(self, ttft_s: float, now: float) -> bool:
        """Whether a plan that gives it its first token after `ttft_s` is too late now, and was not when it came.

        Whom no plan could have served in time is in nobody's way more than others, and is not put off for what it asks.
        """
        return self.may_be_put_off and self.since + ttft_s <= self.due_at < now + ttft_s

    @property
    def may_be_put_off(self) -> bool:
        """It was not yet, nor planned before: it lost its time to a failure."""
        return self.is_new and not self.is_put_off

    @property
    def is_new(self) -> bool:
        """This is its first attempt."""
        return self.request.attempt == 0

    @property
    def is_resumed(self) -> bool:
        """Somebody waits in the middle of its answer."""
        return self.request.num_shown > 0

    def as_put_off(self) -> "Waiting":
        """Until it is put back: who got its turn when nobody else waits would be in the way of those who come next."""
        return replace(self, is_put_off=True)

    @property
    def rank(self) -> tuple[bool, bool]:
        """Of all tenants lower ones first."""
        return self.is_batch, not self.is_resumed

    @property
    def place(self) -> Place:
        """Lower ones first."""
        return *self.rank, self.is_new, -self.request.priority, self.is_put_off, self.due_at, self.number


class WaitingLine:
    """Kept in order by tenant; what is served meanwhile moves tenants."""

    def __init__(self, share: FairShare) -> None:
        self._share = share
        self._by_id: dict[str, Waiting] = {}
        self._by_tenant: dict[str, list[Waiting]] = {}
        self._num_tokens: dict[str, tuple[int, int]] = {}  # of prompts by tenant: all, and those of batch work

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._by_id.values()))

    def find(self, request_id: str) -> Waiting | None:
        """The request, if it waits."""
        return self._by_id.get(request_id)

    def add(self, waiting: Waiting) -> None:
        """It waits from now on."""
        tenant = waiting.request.tenant
        if tenant not in self._by_tenant:
            self._share.arrived(tenant, self._by_tenant.keys())
            self._by_tenant[tenant] = []
        self._insert(self._by_tenant[tenant], waiting)
        self._count(waiting, 1)

    def remove(self, request_id: str) -> Waiting | None:
        """It waits no more; None when it did not."""
        waiting = self._by_id.pop(request_id, None)
        if waiting is not None:
            tenant = waiting.request.tenant
            self._by_tenant[tenant].remove(waiting)
            self._count(waiting, -1)
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant], self._num_tokens[tenant]
        return waiting

    def put_off(self, some: Sequence[Waiting]) -> list[Waiting]:
        """Requests of one tenant go behind its others of their priority. Returns them as they wait from now on."""
        put_off = [one.as_put_off() for one in some]
        if some:
            line = self._by_tenant[some[0].request.tenant]
            gone = {one.number for one in some}
            line[:] = [one for one in line if one.number not in gone]
            for one in put_off:
                self._insert(line, one)
        return put_off

    def put_back(self, waiting: Waiting) -> None:
        """It goes where it was before it was put off. Idempotent."""
        line = self._by_tenant[waiting.request.tenant]
        line.remove(waiting)
        self._insert(line, replace(waiting, is_put_off=False))

    def in_order(self) -> Iterator[Waiting]:
        """Each request once; whoever takes one away and charges its tenant for it changes who comes next."""
        lines = {tenant: iter(tuple(line)) for tenant, line in self._by_tenant.items()}
        heads = {tenant: next(line) for tenant, line in lines.items()}
        while heads:
            tenant = min(heads, key=lambda name: (heads[name].rank, self._share.turn(name), heads[name].place))
            yield heads[tenant]
            following = next(lines[tenant], None)
            if following is None:
                del heads[tenant]
            else:
                heads[tenant] = following

    def by_weight(self) -> list[tuple[float, list[Waiting]]]:
        """Of each tenant: its weight, and its requests that are not batch, in order."""
        return [
            (self._share.weight(tenant), [one for one in line if not one.is_batch])
            for tenant, line in self._by_tenant.items()
        ]

    def last_of_the_longest(self) -> Waiting:
        """Who makes room in a full line: the last request of the tenant that holds most of it for its weight."""
        tenant = max(self._by_tenant, key=lambda name: (len(self._by_tenant[name]) / self._share.weight(name), name))
        return self._by_tenant[tenant][-1]

    def tokens_before(self, waiting: Waiting) -> float:
        """Prompt tokens that will be dispatched until this request is, itself included, if nobody else comes.

        As tenants share by weight, no more of the others' than their part while the tenant's own are dispatched.
        """
        tenant, weight = waiting.request.tenant, self._share.weight(waiting.request.tenant)
        line = self._by_tenant.get(tenant, [])
        own = waiting.request.num_tokens
        own += sum([one.request.num_tokens for one in line[: bisect_left(line, waiting.place, key=_place)]])
        others = 0.0
        for other, (num_tokens, num_of_batch) in self._num_tokens.items():
            if other != tenant:
                num_before = num_tokens if waiting.is_batch else num_tokens - num_of_batch
                others += min(num_before, own * self._share.weight(other) / weight)
        return own + others

    def _insert(self, line: list[Waiting], waiting: Waiting) -> None:
        insort(line, waiting, key=_place)
        self._by_id[waiting.request.request_id] = waiting

    def _count(self, waiting: Waiting, sign: int) -> None:
        num_all, num_of_batch = self._num_tokens.get(waiting.request.tenant, (0, 0))
        num_tokens = sign * waiting.request.num_tokens
        counted = num_all + num_tokens, num_of_batch + (num_tokens if waiting.is_batch else 0)
        self._num_tokens[waiting.request.tenant] = counted


def _place(waiting: Waiting) -> Place:
    return waiting.place
