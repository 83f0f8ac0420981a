"""Requests on prefill from Prefill to Release: jobs, what was announced of them, what decode may still read. Pure.

Prefill -> job --step--> Announce ... --last chunk--> Commit (or Abandon: over with its first token)
               --cancelled--> Abandon                 blocks stay readable until Release or expiry
"""

from collections.abc import Iterator
from dataclasses import dataclass

from core.messages.fleet import ReplicaInfo
from core.messages.to_decode import Abandon, Announce, Commit
from core.messages.to_prefill import Prefill
from core.messages.to_rank import SlabHeader
from engine.batch import StepResult
from engine.block_pool import BlockPool
from kv_transfer.share_book import Share, ShareBook
from prefill_worker.scheduler import Prefilled, PrefillJob, PrefillScheduler, PrefillStep


@dataclass(frozen=True)
class Outgoing:
    """Instruction: tell the job's decode replica."""

    job: PrefillJob
    message: Announce | Commit | Abandon


class Deliveries:
    """The books of one prefill replica; the scheduler's jobs and their shares move together."""

    def __init__(self, info: ReplicaInfo, pool: BlockPool, scheduler: PrefillScheduler, shares: ShareBook) -> None:
        self._info = info
        self._pool = pool
        self._scheduler = scheduler
        self._shares = shares
        self._open: dict[tuple[str, int], Share] = {}

    def __len__(self) -> int:
        return len(self._open)

    def accept(self, message: Prefill, now: float) -> PrefillJob:
        """Queues a request. Raises StaleMessage, Overloaded, PromptTooLong."""
        key = (message.request_id, message.attempt)
        self._shares.refuse_stale(*key)
        job = self._scheduler.add(message, now)
        self._open[key] = self._shares.open(*key, message.ticket.lease_id, now)
        return job

    def next_step(self, now: float) -> tuple[PrefillStep | None, list[Outgoing]]:
        """The next step; what newly started requests found cached is announced with it."""
        step = self._scheduler.schedule(now)
        outgoing: list[Outgoing] = []
        for job, cached in self._scheduler.take_newly_started():
            outgoing += self._announce(job, cached, range(self._info.layout.num_layers), now)
        return step, outgoing

    def layers_done(self, step: PrefillStep, first_layer: int, num_layers: int, now: float) -> list[Outgoing]:
        """Announces the blocks that this step makes final, for these layers."""
        layers = range(first_layer, first_layer + num_layers)
        return [
            outgoing for chunk in step.chunks for outgoing in self._announce(chunk.job, chunk.announce, layers, now)
        ]

    def step_done(self, step: PrefillStep, result: StepResult, now: float) -> list[tuple[Prefilled, Outgoing]]:
        """Prompts that this step completed, each with its closing message."""
        return [(done, self._close(done, now)) for done in self._scheduler.finish(step, result)]

    def cancel(self, request_id: str, attempt: int, now: float) -> list[Outgoing]:
        """Ends this and lower attempts, also ones still to come; blocks that decode may read stay until Release."""
        self._shares.bury(request_id, attempt, now)
        outgoing = []
        for job in self._scheduler.cancel(request_id, attempt):
            outgoing.append(Outgoing(job, Abandon(*job.key, job.message.ticket.lease_id)))
        return outgoing

    def release(self, request_id: str, attempt: int, now: float) -> list[Outgoing]:
        """Decode reads no more of this attempt; if it was still being computed, nobody waits for the rest."""
        outgoing = self.cancel(request_id, attempt, now) if (request_id, attempt) in self._open else []
        self._pool.end_read(self._shares.end(request_id, attempt, now))
        self._open.pop((request_id, attempt), None)
        return outgoing

    def release_expired(self, now: float) -> list[Share]:
        """Ends the shares that decode never released; those of prompts still to be computed wait with them."""
        working = {job.key for job in self._scheduler}
        expired = [share for share in self._shares.expired(now) if (share.request_id, share.attempt) not in working]
        for share in expired:
            self.release(share.request_id, share.attempt, now)
        return expired

    def may_read(self, header: SlabHeader) -> bool:
        """Whether a peer may fetch a slab."""
        return self._shares.may_read(header)

    def validate(self) -> None:
        """Raises AssertionError when the books contradict each other."""
        self._pool.validate()
        assert len(self._shares) == len(self._open)

    def _announce(self, job: PrefillJob, blocks: tuple[range, ...], layers: range, now: float) -> Iterator[Outgoing]:
        """These layers of these logical blocks, by KV group: one message for each group that has any."""
        for number, (group, logical) in enumerate(zip(self._info.layout.kv_groups, blocks, strict=True)):
            places = group.places(layers)
            if places and logical and not job.cancelled:
                yield self._announce_group(job, number, logical, places, now)

    def _announce_group(self, job: PrefillJob, group: int, blocks: range, places: range, now: float) -> Outgoing:
        physical = job.sequence.groups[group].physical(blocks)
        number, fresh = self._shares.announce(self._open[job.key], group, blocks.start, physical, places, now)
        self._pool.begin_read(fresh)
        announce = Announce(
            *job.key,
            lease_id=job.message.ticket.lease_id,
            number=number,
            source=self._info,
            first_layer=places.start,
            num_layers=len(places),
            first_block=blocks.start,
            source_blocks=tuple(physical),
            group=group,
        )
        return Outgoing(job, announce)

    def _close(self, done: Prefilled, now: float) -> Outgoing:
        job = done.job
        share, lease_id = self._open[job.key], job.message.ticket.lease_id
        if done.finish_reason is not None:
            return Outgoing(job, Abandon(*job.key, lease_id))
        self._shares.commit(share, now)
        num_cached = job.sequence.num_cached
        return Outgoing(job, Commit(*job.key, lease_id, share.num_announcements, done.token_id, num_cached))
