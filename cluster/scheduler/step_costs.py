"""What steps of a replica take: coefficients, the roofline that they start from, and sums over a prompt. Pure."""

from dataclasses import dataclass
from math import sqrt

from core.kv_layout import KVLayout
from core.messages.fleet import ReplicaInfo

COMPUTE_SHARE = 0.5  # of a device's peak arithmetic that large products reach
READ_SHARE = 0.75  # of its memory's peak
STEP_OVERHEAD_S = 1e-3  # scheduling, launches, sampling
SEQUENCE_OVERHEAD_S = 2e-5
GUESSED_TOKENS_PER_S = 2000.0  # of prefill, where a replica does not say what it runs on
GUESSED_STEP_S = 0.02  # of decode, likewise


@dataclass(frozen=True)
class StepCosts:
    """Seconds. Of steps that compute parts of prompts: the step, a token, a pair of a token with one that it sees, and
    a token of context of the sequences that decode along. Of steps that only decode: the step, a sequence, a token of
    context.
    """

    chunk_s: float
    token_s: float
    pair_s: float
    beside_s: float
    step_s: float
    sequence_s: float
    context_s: float

    @property
    def of_chunks(self) -> tuple[float, float, float, float]:
        """The first four."""
        return self.chunk_s, self.token_s, self.pair_s, self.beside_s

    @property
    def of_decodes(self) -> tuple[float, float, float]:
        """The others."""
        return self.step_s, self.sequence_s, self.context_s

    def prefill_s(self, num_tokens: int, num_cached: int, num_at_once: int, beside_s: float = 0.0) -> float:
        """A prompt's last `num_tokens` tokens, behind `num_cached`, cut into chunks.

        `beside_s`: what others add to each of these steps.
        """
        num_chunks, pairs_s = -(-num_tokens // num_at_once), self.pair_s * num_pairs(num_tokens, num_cached)
        return (self.chunk_s + beside_s) * num_chunks + self.token_s * num_tokens + pairs_s

    def decode_step_s(self, num_decoding: float, num_kv_tokens: float) -> float:
        """One token for each of a batch."""
        return self.step_s + self.sequence_s * num_decoding + self.context_s * num_kv_tokens


def num_pairs(num_tokens: int, num_before: int) -> float:
    """Of each token with all before it and itself."""
    return num_tokens * (num_before + (num_tokens + 1) / 2)


def roofline(info: ReplicaInfo) -> StepCosts:
    """Of what a replica says of its devices and model (Williams et al., 2009: the slower of arithmetic and reading)."""
    if not (info.flop_per_s and info.read_bytes_per_s and info.num_active_parameters):
        token_s = 1 / GUESSED_TOKENS_PER_S
        small_s = token_s / 20_000  # attention is as dear as all else at contexts of the order
        return StepCosts(STEP_OVERHEAD_S, token_s, small_s, small_s, GUESSED_STEP_S, GUESSED_STEP_S / 100, small_s)
    flop_per_s, bytes_per_s = COMPUTE_SHARE * info.flop_per_s, READ_SHARE * info.read_bytes_per_s
    token_s = 2 * info.num_active_parameters / flop_per_s
    weights_s = info.parameter_bytes / bytes_per_s
    context_s = kv_bytes_per_token(info.layout) / bytes_per_s
    width = sqrt(info.num_active_parameters / (12 * info.layout.num_layers))  # a transformer's, of so many weights
    pair_s = 4 * info.layout.num_layers * width / flop_per_s
    return StepCosts(
        STEP_OVERHEAD_S + weights_s / 2,  # small chunks are bound by weights, which large ones hide
        token_s,
        pair_s,
        context_s,
        STEP_OVERHEAD_S + weights_s,
        SEQUENCE_OVERHEAD_S + token_s,
        context_s,
    )


def kv_bytes_per_token(layout: KVLayout) -> float:
    """Of all layers and ranks, windows left aside."""
    num_groups = len(layout.kv_groups)
    return num_groups * layout.block_bytes / layout.block_size
