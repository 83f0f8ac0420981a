"""Fleets of made-up replicas for stories of decisions: their times per token are round numbers."""

from dataclasses import replace

from cluster.scheduler.admission import Admission
from cluster.scheduler.policy import Choices
from core.block_hash import BlockHash, hash_blocks
from core.config import SchedulerConfig
from core.kv_layout import Compatibility, KVLayout
from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_scheduler import ReplicaStatus, Report, Reserve

BLOCK = 16
LAYOUT = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=BLOCK, dtype="bfloat16", tensor_parallel=1)
TOKEN_BYTES = 131_072  # of KV, in this layout
COMPATIBILITY = Compatibility("m", "r", "bfloat16", BLOCK, "h")

# What replicas measure of themselves: steps with prompts, and steps that only decode.
CHUNK_S, TOKEN_S, PAIR_S, BESIDE_S = 0.004, 50e-6, 1e-9, 2e-8
STEP_S, SEQUENCE_S, CONTEXT_S = 0.008, 50e-6, 2e-8


def info(name: str, role: Role, **changes) -> ReplicaInfo:
    fields = {
        "num_blocks": 40_000, "max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_model_len": 131_072,
    } | changes  # fmt: skip
    sizes = [fields.pop(key) for key in ("num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len")]
    made = ReplicaInfo(name, role, 1, (f"{name}:1",), LAYOUT, COMPATIBILITY, *sizes)
    return replace(made, **fields)


def status(**changes) -> ReplicaStatus:
    fields = {
        "num_waiting": 0, "num_running": 0, "num_waiting_tokens": 0, "num_free_blocks": 40_000, "num_kv_tokens": 0,
        "draining": False, "prefill_tokens_per_s": 0.0, "decode_step_s": 0.0, "num_steps": 0,
    } | changes  # fmt: skip
    return ReplicaStatus(**fields)


def chunk_sample(num_tokens: int, num_before: int, slow: float = 1.0, num_decoding: int = 0, num_kv: int = 0):
    pairs = num_tokens * num_before + num_tokens * (num_tokens + 1) // 2
    seconds = CHUNK_S + TOKEN_S * (num_tokens + num_decoding) + PAIR_S * pairs + BESIDE_S * num_kv
    return (num_tokens, pairs, num_decoding, num_kv, slow * seconds)


def decode_sample(num_decoding: int, num_kv: int, slow: float = 1.0):
    return (0, 0, num_decoding, num_kv, slow * (STEP_S + SEQUENCE_S * num_decoding + CONTEXT_S * num_kv))


def steps_of(slow: float = 1.0):
    """Enough to tell all coefficients apart."""
    chunks = [
        chunk_sample(tokens, before, slow, decoding, 1000 * decoding)
        for tokens, before, decoding in ((64, 0, 0), (2048, 0, 0), (512, 16_000, 8), (2048, 60_000, 0), (100, 0, 60))
    ]
    decodes = [decode_sample(*batch, slow) for batch in ((1, 500), (64, 1000), (16, 100_000), (128, 400_000))]
    return (*chunks, *decodes)


class World:
    """A scheduler and its fleet, told of by reports alone."""

    def __init__(self, config: SchedulerConfig | None = None, *, policy=None) -> None:
        self.admission = Admission(config or SchedulerConfig(replica_timeout_s=1e9), policy=policy)
        self._num_requests = 0

    def add(self, name: str, role: Role, slow: float = 1.0, **changes) -> ReplicaInfo:
        """A replica with a measured past; `changes` of its info."""
        made = info(name, role, **changes)
        self.admission.report(Report(made, 0, True, status(num_free_blocks=made.num_blocks), (), ()), 0.0)
        for _ in range(20):
            self.report(name, steps=steps_of(slow))
        return made

    def fleet(self, num_prefill: int, num_decode: int) -> None:
        for number in range(num_prefill):
            self.add(f"p{number}", Role.PREFILL)
        for number in range(num_decode):
            self.add(f"d{number}", Role.DECODE)

    def report(self, name: str, *, stored=(), removed=(), tiers=b"", steps=(), transfers=(), now=0.0, **changes):
        view = self.admission.fleet.get(name)
        if (tier_status := changes.pop("tier_status", None)) is not None:
            changes["tiers"] = tier_status
        told = replace(view.status, **changes)
        parts = (view.info, 0, False, told, tuple(stored), tuple(removed), tiers, tuple(steps), tuple(transfers))
        self.admission.report(Report(*parts), now)

    def request(self, num_tokens: int, **changes) -> Reserve:
        self._num_requests += 1
        first = 1_000_000 * self._num_requests
        tokens = changes.pop("tokens", None) or range(first, first + num_tokens)
        fields = {"max_new_tokens": 64, "timeout_s": 60.0} | changes
        hashes = hash_blocks(tokens, BLOCK)
        return Reserve(f"r{self._num_requests}", 0, "i", num_tokens, block_hashes=hashes, **fields)

    def decide(self, request: Reserve, now: float = 0.0):
        """Without taking it."""
        admission = self.admission
        generation = ""
        cached = admission.index.match(request.block_hashes[: (request.num_tokens - 1) // BLOCK])
        pools = [admission.fleet.in_generation(role, generation, now) for role in Role]
        return admission.policy.decide(request, Choices(*pools, cached, now, admission.fleet.by_id))

    def plan(self, request: Reserve, now: float = 0.0):
        self.admission.reserve(request, now)
        plans = self.admission.dispatch(now)
        return plans[0] if plans else None


def asked_for(world: World, monkeypatch) -> list[str]:
    """Fills with the ids of the requests that a policy is asked about, from now on."""
    asked, decide = list[str](), world.admission._decide

    def noting(request: Reserve, *others):
        asked.append(request.request_id)
        return decide(request, *others)

    monkeypatch.setattr(world.admission, "_decide", noting)
    return asked


def blocks_of(tokens, num_tokens: int | None = None) -> tuple[BlockHash, ...]:
    return hash_blocks(tuple(tokens)[:num_tokens], BLOCK)
