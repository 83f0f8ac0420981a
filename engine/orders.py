"""What the first rank of a replica has the others do, as lists of 64-bit integers. Pure."""

from dataclasses import dataclass
from itertools import accumulate

from engine.batch import StepBatch
from engine.batch_codec import decode_batch, encode_batch

STOP, KEEP_ALIVE, STEP = range(3)  # the first number says what follows


@dataclass(frozen=True)
class Orders:
    """A step, and the sizes of the layer groups in it that are told of, in order; layers beyond them are not."""

    batch: StepBatch
    layer_groups: tuple[int, ...] = ()

    @property
    def group_sizes(self) -> dict[int, int]:
        """By the layer after the group."""
        return dict(zip(accumulate(self.layer_groups), self.layer_groups, strict=True))

    def encode(self) -> list[int]:
        """With STEP before it."""
        return [STEP, len(self.layer_groups), *self.layer_groups, *encode_batch(self.batch)]


def decode_orders(values: list[int]) -> Orders:
    """Inverse of `Orders.encode`."""
    stop = 2 + values[1]
    return Orders(decode_batch(values[stop:]), tuple(values[2:stop]))
