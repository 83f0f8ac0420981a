"""The shape of a replica's KV cache, and what two replicas must have in common to exchange it.

A pool is a tensor [places, num_blocks, planes, num_kv_heads_of_rank, block_size, head_dim]; a block holds tokens of one
KV group (see kv_groups), a place those of one of its layers. Keys and values are two planes (0 = K, 1 = V); head-major,
so that a range of heads of one block is one contiguous run for K and one for V. Latents of multi-head latent attention
(DeepSeek-V2) are one plane of one head, whole on every rank.

The ranks of a replica are stages of a pipeline, each with consecutive layers, and parts of a stage, each with heads:

    pipeline_parallel 2, tensor_parallel 2, 5 layers       rank      0    1    2    3
                                                           layers  [ 0 1 2 ] [  3 4  ]
                                                           part      0    1    0    1
"""

from bisect import bisect_right
from dataclasses import dataclass, fields, replace
from functools import cached_property

from core.errors import Incompatible
from core.kv_groups import KVGroup

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
    groups: tuple[KVGroup, ...] = ()  # empty: one, with all layers and no window
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        wider, narrower = (
            max(self.tensor_parallel, self.num_kv_heads),
            min(self.tensor_parallel, self.num_kv_heads),
        )
        assert wider % narrower == 0, "tensor_parallel must divide num_kv_heads or be a multiple of it"

    @property
    def num_ranks(self) -> int:
        """Of the replica."""
        return self.pipeline_parallel * self.tensor_parallel

    def stage_of(self, rank: int) -> int:
        """The rank's number along the pipeline."""
        return rank // self.tensor_parallel

    def part_of(self, rank: int) -> int:
        """The rank's number within its stage."""
        return rank % self.tensor_parallel

    def layers_of_stage(self, stage: int) -> range:
        """The model's layers of a stage; where they cannot be equally many, the first stages have one more."""
        first, stop = (-(-self.num_layers * number // self.pipeline_parallel) for number in (stage, stage + 1))
        return range(first, stop)

    def places_of_stage(self, stage: int, group: int) -> range:
        """Places in blocks of a KV group, as numbered for the whole model, whose layers a stage has."""
        return self.kv_groups[group].places(self.layers_of_stage(stage))

    def groups_of_stage(self, stage: int) -> tuple[KVGroup, ...]:
        """All KV groups with the stage's layers alone: their places are those in the pools of its ranks."""
        return tuple(
            replace(group, layers=tuple(group.layers[place] for place in self.places_of_stage(stage, number)))
            for number, group in enumerate(self.kv_groups)
        )

    @cached_property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """At least one."""
        return self.groups or (KVGroup(tuple(range(self.num_layers))),)

    @property
    def num_places(self) -> int:
        """Layers that a block has room for, over all stages."""
        return max(len(group.layers) for group in self.kv_groups)

    @cached_property
    def places_per_rank(self) -> int:
        """Layers that a block has room for in one rank's pool: alike in all stages, as the number of blocks is."""
        groups = range(len(self.kv_groups))
        return max(len(self.places_of_stage(stage, g)) for stage in range(self.pipeline_parallel) for g in groups)

    @property
    def reaches(self) -> tuple[int | None, ...]:
        """By group, see KVGroup.reach."""
        return tuple(group.reach(self.block_size) for group in self.kv_groups)

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
        first = self.part_of(rank) * self.num_kv_heads // self.tensor_parallel
        return range(first, first + self.heads_per_rank)

    @property
    def cell_bytes(self) -> int:
        """Bytes of one place of one block in one rank's pool."""
        return self.num_planes * self.heads_per_rank * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes_per_rank(self) -> int:
        """Bytes of one block over all its places in one rank's pool."""
        return self.places_per_rank * self.cell_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block that is full in all its places, over all ranks."""
        return self.num_places * self.tensor_parallel * self.cell_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        """Logical blocks that `num_tokens` tokens are cut into; each KV group has its own of each."""
        return -(-num_tokens // self.block_size)

    def num_blocks_held(self, num_tokens: int, num_at_once: int) -> int:
        """Blocks over all groups that a sequence holds at most until it has `num_tokens` tokens.

        `num_at_once`: tokens of a step; what is behind a window after it is given back.
        """
        num_logical = self.num_blocks_for(num_tokens)
        at_once = (group.most_at_once(num_at_once, self.block_size) for group in self.kv_groups)
        return sum(num_logical if most is None else min(num_logical, most) for most in at_once)

    def num_blocks_missing(self, num_cached: int, num_tokens: int) -> int:
        """Blocks over all groups that the token after `num_tokens` others sees, the first `num_cached` logical ones
        left out.
        """
        end = self.num_blocks_for(num_tokens)
        firsts = (group.first_needed(num_tokens, self.block_size) for group in self.kv_groups)
        return sum(max(0, end - max(num_cached, first)) for first in firsts)

    def longest_within(self, num_blocks: int, num_at_once: int, limit: int) -> int:
        """Tokens of the longest sequence that `num_blocks` hold, `limit` at most; `num_at_once` as above."""
        longest = bisect_right(
            range(1, self.num_blocks_for(limit) + 1),
            num_blocks,
            key=lambda logical: self.num_blocks_held(logical * self.block_size, num_at_once),
        )
        return min(limit, longest * self.block_size)


@dataclass(frozen=True)
class Compatibility:
    """What must be equal on both sides of a transfer. Layouts may differ in parallel degrees and block size."""

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
