"""What the global scheduler hears: from ingresses (Reserve, Progress, Renew, Finish), supervisors (Register) and,
by Watch streams that it opens itself, from replicas (Report).
"""

from dataclasses import dataclass, field

from core.block_hash import BlockHash, BlockKey
from core.messages.fleet import ReplicaInfo, Role


@dataclass(frozen=True)
class Reserve:
    """Ask for a plan; pending until there is room. `avoid` names replicas that just failed this request."""

    request_id: str
    attempt: int
    ingress_id: str
    num_tokens: int  # to prefill: prompt plus tokens already shown
    max_new_tokens: int
    block_hashes: tuple[BlockHash, ...]
    timeout_s: float
    avoid: tuple[str, ...] = ()
    placement: str = "auto"  # "pair" or "local" when the client insists
    generation: str = ""  # of the tokens already shown; empty: the traffic split decides
    tenant: str = ""  # with whom the fleet is shared by weight, whose answers tell how long this one may become
    slo_class: str = "standard"  # or interactive, batch
    ttft_slo_s: float = 0.0  # 0: that of its class
    itl_slo_s: float = 0.0
    priority: int = 0  # among the tenant's own; higher ones first
    num_known_replicas: int = 0  # in the ingress's last view: a scheduler that has just started and knows fewer refuses
    num_shown: int = 0  # of `num_tokens`: somebody reads the answer, and waits in its middle

    @property
    def is_batch(self) -> bool:
        """It fills what others leave."""
        return self.slo_class == "batch"


@dataclass(frozen=True)
class Plan:
    """Where a request runs. `prefill` None: decode prefills by itself."""

    request_id: str
    attempt: int
    prefill: ReplicaInfo | None
    decode: ReplicaInfo
    queue_s: float
    predicted_ttft_s: float
    reason: str  # one word for metrics, see cluster.scheduler.decision; or fallback
    pull_from: ReplicaInfo | None = None  # whose cached prefix whoever prefills shall fetch first
    pull_patience_s: float = 0.0  # and wait for it no longer, but compute; 0: as long as it takes


@dataclass(frozen=True)
class Progress:
    """A request's first token is out: its prefill work is done."""

    request_id: str
    num_cached_tokens: int | None = None  # of the prompt, that prefill found cached; None: unknown


@dataclass(frozen=True)
class TokenPace:
    """How an attempt's tokens came to its ingress. None: too few came to tell."""

    handoff_s: float | None = None  # from prefill's token to decode's first, where they are two replicas
    itl_s: float | None = None  # mean time of decode's tokens after its first


NO_PACE = TokenPace()


@dataclass(frozen=True)
class Finish:
    """The reservation of a request ends, for this attempt and lower ones. May overtake its Reserve."""

    request_id: str
    attempt: int
    num_output_tokens: int | None = None  # over all attempts, of a request that came to its end; None: it did not
    pace: TokenPace = NO_PACE  # of this attempt, however it ended


@dataclass(frozen=True)
class Traffic:
    """How requests are shared out between generations. Replicas remember the newest for a scheduler that restarts."""

    version: int = 0
    weights: dict[str, float] = field(default_factory=dict)  # by generation
    previous: dict[str, float] = field(default_factory=dict)  # before the last change


@dataclass(frozen=True)
class Register:
    """A supervisor's heartbeat: this replica lives. The scheduler watches it from then on."""

    info: ReplicaInfo
    traffic: Traffic = Traffic()


@dataclass(frozen=True)
class Registered:
    """Whether the scheduler watches the replica already, and the traffic split to remember."""

    known: bool = True
    traffic: Traffic = Traffic()


@dataclass(frozen=True)
class SetTraffic:
    """New weights by generation; None returns to those before the last change."""

    weights: dict[str, float] | None


@dataclass(frozen=True)
class Deregister:
    """A supervisor is ending its replica."""

    replica_id: str
    incarnation: int


@dataclass(frozen=True)
class Renew:
    """The reservations of these requests live on."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True)
class Book:
    """The address book of the fleet as the scheduler sees it."""

    replicas: tuple[ReplicaInfo, ...]
    num_waiting: int = 0
    weights: dict[str, float] = field(default_factory=dict)  # of the traffic split in force, by generation
    can_grow: bool = False  # requests may wait for a decode replica to come


@dataclass(frozen=True)
class Watch:
    """Subscribe to a replica: the first report is a snapshot."""

    watcher_id: str


@dataclass(frozen=True)
class LinkStatus:
    """What a replica measured of the link from one that it receives KV from."""

    source_id: str
    bytes_per_s: float  # recent
    num_bytes: int  # since the receiver started
    num_transfers: int
    num_digests: int = 0  # slabs whose content was compared with the sender's
    num_corrupt: int = 0  # transfers dropped because it differed


@dataclass(frozen=True)
class TierStatus:
    """One of the places where a replica keeps blocks, since it started; its hit rate is found / wanted."""

    name: str  # device, host, disk
    num_slots: int
    num_cached: int
    num_wanted: int = 0  # prefix blocks of prompts that no tier above had
    num_found: int = 0
    bytes_in: int = 0  # over all ranks, from other tiers
    bytes_out: int = 0
    restore_bytes_per_s: float = 0.0  # recent, over all ranks, to the device; 0 while unknown


@dataclass(frozen=True)
class ReplicaStatus:
    """Load of a replica at one moment."""

    num_waiting: int  # requests accepted, not yet running
    num_running: int
    num_waiting_tokens: int  # prompt tokens still to compute, of all accepted requests
    num_free_blocks: int  # reusable now, cached ones included, minus what leases promise
    num_kv_tokens: int  # context tokens of running sequences
    draining: bool
    prefill_tokens_per_s: float  # recent, 0 while unknown
    decode_step_s: float  # recent, 0 while unknown
    num_steps: int
    links: tuple[LinkStatus, ...] = ()  # by source
    tiers: tuple[TierStatus, ...] = ()  # the fastest first


# Tokens of prompts that a step computed, pairs of those with the tokens that each of them sees, sequences that it
# decoded, context tokens of these, and the seconds that it took.
StepSample = tuple[int, int, int, int, float]
TransferSample = tuple[str, int, float]  # replica that KV came from, bytes over all ranks, seconds


@dataclass(frozen=True)
class Report:
    """Status, and what changed in the prefix cache since the report before. A gap in `sequence` asks to watch anew."""

    info: ReplicaInfo
    sequence: int
    snapshot: bool  # `stored` is the whole cache
    status: ReplicaStatus
    stored: tuple[BlockKey, ...]
    removed: tuple[BlockKey, ...]
    tiers: bytes = b""  # of each stored block, the fastest that holds it: 0 the device; empty: all on the device
    steps: tuple[StepSample, ...] = ()  # since the report before, the latest ones
    transfers: tuple[TransferSample, ...] = ()  # likewise, that came in


@dataclass(frozen=True)
class ReplicaState:
    """A replica as the scheduler last heard of it."""

    info: ReplicaInfo
    status: ReplicaStatus
    silent_s: float  # since the last report


@dataclass(frozen=True)
class PoolSize:
    """How many replicas a generation's autoscaler has asked for, and why."""

    generation: str
    role: Role
    num_replicas: int
    reason: str


@dataclass(frozen=True)
class RelativeError:
    """Of the latest predictions: |predicted - actual| / actual."""

    quantity: str  # ttft, itl
    num_samples: int  # since the scheduler started
    median: float
    p95: float


@dataclass(frozen=True)
class Foresight:
    """How the scheduler's predictions compare with what came."""

    errors: tuple[RelativeError, ...] = ()
    num_hits_checked: int = 0  # plans that counted on cached tokens, compared with what prefill found
    num_hits_missed: int = 0  # those where it found fewer
    num_tokens_missed: int = 0  # that it had to compute against the plan


@dataclass(frozen=True)
class FleetStatus:
    """The whole fleet at one moment."""

    scheduler_id: str
    replicas: tuple[ReplicaState, ...]
    num_waiting: int  # requests without a plan
    num_reserved: int  # requests with one
    traffic: Traffic = Traffic()
    sizes: tuple[PoolSize, ...] = ()  # where autoscalers run
    foresight: Foresight | None = None  # what came of predictions


@dataclass(frozen=True)
class Why:
    """Asks for the decisions about a request, by its id, its answer's, or the X-Request-Id of its call."""

    request_id: str


@dataclass(frozen=True)
class ExplainedCandidate:
    """One way that was weighed, and the terms of its cost in seconds. See cluster.scheduler.candidate.Terms."""

    prefill_id: str  # empty: decode prefills by itself
    decode_id: str
    lender_id: str  # whose cached prefix would be pulled first
    reason: str
    queue_s: float
    pull_s: float
    restore_s: float
    prefill_s: float
    transfer_s: float
    wait_s: float
    itl_s: float
    evict_s: float = 0.0
    work_s: float = 0.0
    strain_s: float = 0.0


@dataclass(frozen=True)
class Explained:
    """One decision: what was weighed, the chosen one first, and what came of it. None: not known yet, or never."""

    request_id: str
    attempt: int
    tenant: str
    slo_class: str
    num_tokens: int
    max_new_tokens: int
    num_expected_tokens: float
    num_cached_tokens: int
    queue_s: float
    candidates: tuple[ExplainedCandidate, ...]
    actual_first_token_s: float | None  # from dispatch, as queue, pull, restore and prefill of a candidate
    actual_itl_s: float | None  # see TokenPace, as the next one
    actual_cached_tokens: int | None
    actual_output_tokens: int | None
    is_over: bool
    actual_handoff_s: float | None = None  # as transfer, wait and one step of a candidate


@dataclass(frozen=True)
class Decisions:
    """What is still remembered, the oldest first."""

    decisions: tuple[Explained, ...]
