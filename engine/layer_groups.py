"""How the layers of a step are grouped for those that are told when KV is written. Pure.

A group can travel while the next ones are computed; beside the last nothing is left to compute, so it should be small:

    12 layers, at most 4       [ 0 1 2 3 | 4 5 6 7 | 8 9 10 11 ]
    down to 1                  [ 0 1 2 3 | 4 5 6 7 | 8 9 | 10 | 11 ]
"""


def layer_groups(num_layers: int, largest: int, last: int | None = None) -> tuple[int, ...]:
    """Sizes of the groups in order, `largest` layers each as far as they go.

    With `last`, the final group is halved until its last part has at most that many.
    """
    num_whole, rest = divmod(num_layers, largest)
    groups = [largest] * num_whole + [rest] * bool(rest)
    while last is not None and groups[-1] > last:
        final = groups.pop()
        groups += [-(-final // 2), final // 2]
    return tuple(groups)
