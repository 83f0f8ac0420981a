"""The one block hash of the fleet: ingress, scheduler and block pools must agree on it bit for bit.

A block's hash covers its own tokens and, by chaining, every token before it; the chain starts from a seed of
tenant salt and adapter, so equal tokens of different tenants or adapters never share KV.
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence

BlockHash = bytes
BlockKey = bytes  # a block's hash and, unless it is 0, the number of its KV group

HASH_SCHEME = "blake2b-128/i32le/v1"
_DIGEST_BYTES = 16
_TOKEN_BYTES = 4


def chain_seed(tenant_salt: str = "", adapter: str = "") -> BlockHash:
    """Parent hash of a sequence's first block."""
    material = "\x1f".join((HASH_SCHEME, tenant_salt, adapter)).encode()
    return hashlib.blake2b(material, digest_size=_DIGEST_BYTES).digest()


def salt_of(fleet_salt: str, tenant: str) -> str:
    """Of a tenant that shares no prefixes with others; the fleet's own without one."""
    return f"{fleet_salt}\x1e{tenant}" if tenant else fleet_salt


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of one full block that follows `parent`. Raises OverflowError for ids beyond 31 bits."""
    return hashlib.blake2b(parent + _encoded(token_ids), digest_size=_DIGEST_BYTES).digest()


def in_group(block_hash: BlockHash, group: int) -> BlockKey:
    """What names the block of a KV group that holds the hash's tokens: cached blocks are found by it."""
    return block_hash if group == 0 else block_hash + group.to_bytes(2, "big")


def hash_blocks(
    token_ids: Sequence[int], block_size: int, tenant_salt: str = "", adapter: str = ""
) -> tuple[BlockHash, ...]:
    """Chained hashes of the full blocks of `token_ids`; a partial last block has none."""
    parent = chain_seed(tenant_salt, adapter)
    encoded, hashes = _encoded(token_ids), []
    num_bytes = block_size * _TOKEN_BYTES
    for start in range(0, len(encoded) - num_bytes + 1, num_bytes):
        parent = hashlib.blake2b(parent + encoded[start : start + num_bytes], digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)
    return tuple(hashes)


def num_common(some: Sequence[BlockHash], others: Sequence[BlockHash], low: int = 0) -> int:
    """Leading blocks of both, of which `low` are known to be: a block's hash is of all before it, too."""
    high = min(len(some), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if some[middle - 1] == others[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _encoded(token_ids: Sequence[int]) -> bytes:
    if isinstance(token_ids, array) and token_ids.typecode == "i" and sys.byteorder == "little":
        return token_ids.tobytes()
    try:
        return struct.pack(f"<{len(token_ids)}i", *token_ids)  # half the time that an array takes to be filled
    except struct.error:
        return array("i", token_ids).tobytes()  # says what is wrong with them
