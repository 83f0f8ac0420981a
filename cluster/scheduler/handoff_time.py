"""What of a transfer is left when prefill has drawn the first token. Pure.

KV leaves as layers of chunks are computed; the wire can be behind, and the last piece is ready only at the end:

    before      | chunk 1 | chunk 2 | chunk 3 |- first token
    backlog     [=====]                       .
    transfer                [====  total  ====.=====]          the wire is the slower: first piece + total - compute
    transfer                  [==]   [===]    .[=]             compute is the slower: the last piece
                                              '----- left -----'
"""


def left_s(
    num_bytes: float,
    last_bytes: float,
    backlog_bytes: float,
    byte_s: float,
    before_s: float,
    compute_s: float,
    first_s: float,
) -> float:
    """Seconds from the first token until all is there, latency left out.

    The backlog is in flight before this transfer, and shrinks in the `before_s` seconds until compute begins. The first
    piece is ready after `first_s` of the `compute_s` seconds, the last one, of `last_bytes`, at their end.
    """
    backlog_s = max(0.0, backlog_bytes * byte_s - before_s)
    behind_s = max(backlog_s, first_s) + num_bytes * byte_s - compute_s
    return max(last_bytes * byte_s, behind_s)
