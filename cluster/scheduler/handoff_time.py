"""What of a transfer is left when prefill has drawn the first token. Pure.

KV leaves as layers of chunks are computed; the wire can be behind, and the last piece is ready only at the end:

    queue       | chunk 1 | chunk 2 | chunk 3 |- first token
    before it:  [backlog ]                    .
    transfer                [====  total  ====.=====]          the wire is the slower: first piece + total - compute
    transfer                  [==]   [===]    .[=]             compute is the slower: the last piece
                                              '----- left -----'
"""

from typing import NamedTuple


class Handoff(NamedTuple):
    """One transfer. Bytes that P holds cached are ready when its turn comes."""

    num_bytes: float
    last_bytes: float  # the piece that is ready last
    backlog_bytes: float  # in flight on the way before it
    queue_s: float  # before compute begins; the backlog shrinks meanwhile
    compute_s: float
    first_s: float  # of compute, until the first piece is ready


def left_s(handoff: Handoff, latency_s: float, byte_s: float) -> float:
    """Seconds from the first token until decode has it all; nothing to send costs nothing."""
    if not handoff.num_bytes:
        return 0.0
    backlog_s = max(0.0, handoff.backlog_bytes * byte_s - handoff.queue_s)
    wire_s = max(backlog_s, handoff.first_s) + handoff.num_bytes * byte_s - handoff.compute_s
    return latency_s + max(handoff.last_bytes * byte_s, wire_s)
