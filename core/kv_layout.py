"""The shape of a replica's KV cache, and what two replicas must have in common to exchange it.

Per layer a pool is a tensor [num_blocks, planes, num_kv_heads_of_rank, block_size, head_dim]. Keys and values are two
planes (0 = K, 1 = V); head-major, so that a range of heads of one block is one contiguous run for K and one for V.
Latents of multi-head latent attention (DeepSeek-V2) are one plane of one head, whole on every rank.
"""

from dataclasses import dataclass, fields

from core.errors import Incompatible

TRANSFER_PROTOCOL = 3  # how KV moves between two ranks; the control plane has its own version in core/version.py

MODEL_DTYPES = ("float32", "bfloat16", "float16")  # what models are loaded and computed in
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}  # what KV may be stored in


@dataclass(frozen=True)
class KVLayout:
    """KV geometry of one replica; `num_kv_heads` counts the whole model, not one rank.

    Of latents, `num_kv_heads` is 1 and `head_dim` the size of one token's latent, its rotary part included.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens per block of the device's pool
    dtype: str
    tensor_parallel: int
    latent: bool = False

    def __post_init__(self) -> None:
        wider, narrower = (
            max(self.tensor_parallel, self.num_kv_heads),
            min(self.tensor_parallel, self.num_kv_heads),
        )
        assert wider % narrower == 0, "tensor_parallel must divide num_kv_heads or be a multiple of it"

    @property
    def num_planes(self) -> int:
        """Keys and values, or latents alone."""
        return 1 if self.latent else 2

    @property
    def heads_per_rank(self) -> int:
        """KV heads held by each rank; heads are replicated when there are more ranks than heads."""
        return max(1, self.num_kv_heads // self.tensor_parallel)

    def heads_of_rank(self, rank: int) -> range:
        """Model-wide indices of the KV heads that `rank` holds."""
        first = rank * self.num_kv_heads // self.tensor_parallel
        return range(first, first + self.heads_per_rank)

    @property
    def block_bytes_per_rank(self) -> int:
        """Bytes of one block over all layers in one rank's pool."""
        per_token = self.num_planes * self.heads_per_rank * self.head_dim * DTYPE_BYTES[self.dtype]
        return self.num_layers * self.block_size * per_token

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True)
class Compatibility:
    """What must be equal on both sides of a transfer. Layouts may differ in tensor parallel degree and block size."""

    model: str
    weights_revision: str
    kv_dtype: str
    block_size: int  # tokens that one block hash covers, in the whole fleet
    hash_scheme: str
    protocol_version: int = TRANSFER_PROTOCOL  # on the wire under its first name

    def require_equal(self, other: "Compatibility") -> None:
        """Raises Incompatible naming the first field that differs."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours != theirs:
                raise Incompatible(f"{field.name} differs: {ours!r} here, {theirs!r} there", field=field.name)
