"""Which replicas may serve a request, whatever they cost: compatibility, room, limits. Pure."""

from collections.abc import Collection, Sequence

from cluster.scheduler.replica_view import ReplicaView
from core.block_hash import BlockHash
from core.messages.fleet import ReplicaInfo
from core.messages.to_scheduler import Reserve
from core.version import PIPELINE_PROTOCOL

STEPS_HELD = 1  # beside one for each of its stages, a worker holds about so many steps; the rest waits at the scheduler


def can_pair(prefill: ReplicaInfo, decode: ReplicaInfo) -> bool:
    """KV blocks of one mean the same to the other, which finds them, and both are of one generation."""
    means_the_same = prefill.compatibility == decode.compatibility and prefill.layout.groups == decode.layout.groups
    finds_stages = prefill.layout.pipeline_parallel == 1 or decode.protocol >= PIPELINE_PROTOCOL
    return means_the_same and finds_stages and prefill.generation == decode.generation


def fits_prefill(request: Reserve, prefill: ReplicaInfo) -> bool:
    """Whether the prompt can be computed there."""
    return request.num_tokens <= prefill.max_model_len


def takes_more(prefill: ReplicaView, *, is_batch: bool = False) -> bool:
    """Whether the replica holds less than about two steps of work, or as many more as it has more stages.

    Batch work waits until it holds none.
    """
    held, num_steps = prefill.outstanding_prefill_tokens, prefill.info.layout.pipeline_parallel + STEPS_HELD
    return held == 0 if is_batch else held < num_steps * prefill.info.max_num_batched_tokens


def has_free_slot(decode: ReplicaView, max_kv_usage: float) -> bool:
    """Whether a request of hardly any tokens would find room."""
    is_below_watermark = decode.num_free_blocks > (1 - max_kv_usage) * decode.info.num_blocks
    return is_below_watermark and decode.num_decode_requests < decode.info.max_num_seqs


def has_room(num_tokens: int, decode: ReplicaView, num_at_once: int, max_kv_usage: float) -> bool:
    """Whether a sequence of so many tokens, computed `num_at_once` a step, finds a place in the batch and blocks.

    Cached blocks count, too: nobody may hold them yet, and taking them makes them no longer free. The watermark
    leaves the running sequences room to grow; there are none on an empty replica.
    """
    needed = decode.info.layout.num_blocks_held(num_tokens, num_at_once)
    is_empty = decode.num_decode_requests == 0
    spared = 0.0 if is_empty else (1 - max_kv_usage) * decode.info.num_blocks
    return decode.num_free_blocks - needed >= spared and decode.num_decode_requests < decode.info.max_num_seqs


def uncached_tokens(request: Reserve, num_blocks: int, replica: ReplicaView) -> int:
    """Tokens that are left to compute behind so many leading blocks; the last one always is."""
    return max(1, request.num_tokens - num_blocks * replica.info.layout.block_size)


def usable_hashes(request: Reserve, block_size: int) -> Sequence[BlockHash]:
    """Of the prompt's leading blocks, those that a cache can be of use for: one token must be computed."""
    return request.block_hashes[: (request.num_tokens - 1) // block_size]


def without(replicas: Sequence[ReplicaView], avoid: Collection[str]) -> Sequence[ReplicaView]:
    """Leaves out the replicas that just failed the request, unless none would be left."""
    if not avoid:
        return replicas
    return [replica for replica in replicas if replica.info.replica_id not in avoid] or replicas
