"""Whoever prefills a prompt: what stands before its first token there, computed or pulled from a lender. Pure."""

from collections.abc import Mapping

from cluster.scheduler.link_book import LinkBook
from cluster.scheduler.matches import Matches
from cluster.scheduler.site import Site

WORK_COUNTS = 0.25  # for so much beside TTFT: others wait for what a replica computes, the more the fuller the fleet


class Source:
    """A prefill replica, or decode itself. A plain class: each decision makes several, and quickly."""

    __slots__ = (
        "evict_s",
        "first_piece_s",
        "first_token_s",
        "last_bytes",
        "lender",
        "num_indexed",
        "num_steps",
        "num_uncached",
        "prefill_s",
        "pull_s",
        "queue_s",
        "restore_s",
        "site",
        "work_s",
    )  # fmt: skip

    def __init__(
        self,
        site: Site,
        lender: Site | None,
        num_uncached: int,
        num_indexed: int,
        queue_s: float,
        pull_s: float,
        restore_s: float,
        prefill_s: float,
    ) -> None:
        before_s = queue_s + pull_s + restore_s
        self.num_steps = site.num_steps(num_uncached)
        self.site = site
        # no part of TTFT, but others'
        self.evict_s = site.evict_s(-(-num_uncached // site.block_size))
        self.work_s = WORK_COUNTS * prefill_s
        self.lender = lender  # whom a prefix is pulled from
        self.num_uncached = num_uncached
        self.num_indexed = num_indexed  # tokens that are cached by now, here or at the lender, as far as they are used
        self.queue_s = queue_s
        self.pull_s = pull_s
        self.restore_s = restore_s
        self.prefill_s = prefill_s
        self.first_token_s = before_s + prefill_s
        # of KV that is ready only with the first token: the last layer's of the last chunk
        self.last_bytes = min(num_uncached, site.max_at_once) * site.kv_layer_bytes
        # until the first piece of KV is ready: one layer's of the first chunk
        self.first_piece_s = before_s + prefill_s / (self.num_steps * site.num_layers)


class Sources:
    """Sources of one request."""

    def __init__(
        self,
        links: LinkBook,
        num_tokens: int,
        matches: Matches,
        lenders: tuple[Site, ...],
        pull_min_tokens: int,
        now: float,
        coming: Mapping[str, int],
    ) -> None:
        """`lenders` have the deepest prefixes. `coming`: see ComingPrefixes.depths."""
        self.now = now
        self._links = links
        self._num_tokens = num_tokens
        self._matches = matches
        self._lenders = [(matches.depth(site.replica_id), site) for site in lenders]
        self._coming = coming
        self._pull_min_tokens = pull_min_tokens

    def of(self, site: Site, beside_s: float = 0.0) -> Source:
        """The faster of computing what is not cached and pulling; `beside_s`: what others add to each of its steps."""
        num_tokens, block_size, matches = self._num_tokens, site.block_size, self._matches
        depth = matches.depth(site.replica_id)
        restore_s = site.restore_s(matches, depth) if depth and matches.has_below else 0.0
        num_indexed = min(depth * block_size, num_tokens - 1)
        depth = max(depth, self._coming.get(site.replica_id, 0))  # what is computed there stands in its queue
        num_uncached = max(1, num_tokens - depth * block_size)
        prefill_s = site.prefill_s(num_uncached, num_tokens, beside_s)
        pull_s, best_lender = 0.0, None
        for lent, lender in self._lenders:
            if lent <= depth:
                break
            num_left = max(1, num_tokens - lent * block_size)
            if num_uncached - num_left < self._pull_min_tokens or lender is site or lender.kind != site.kind:
                continue
            latency_s, byte_s = self._links.cost(lender.view, site.view)
            num_bytes = site.num_missing(depth, lent * block_size) * site.block_bytes
            other_pull_s = 2 * latency_s + num_bytes * byte_s  # asked for, then fetched
            if matches.has_below:
                other_pull_s += lender.restore_s(matches, lent)
            other_prefill_s = site.prefill_s(num_left, num_tokens, beside_s)
            if other_pull_s + other_prefill_s < pull_s + prefill_s:
                pull_s, prefill_s, num_uncached, best_lender = other_pull_s, other_prefill_s, num_left, lender
                num_indexed = num_tokens - num_left
        queue_s = site.queue_left_s(self.now)
        return Source(site, best_lender, num_uncached, num_indexed, queue_s, pull_s, restore_s, prefill_s)
