"""The fence of a sender: which of a receiver's messages belong to the channel that is open, and which are stale. Pure.

    (nothing) --connect--> generation g, slab 0, 1, 2, ... --connect of g' > g--> generation g', slab 0, 1, ...
                                                           --close of g, failure--> (nothing)

A receiver that restarted has another incarnation, and its generations begin anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import StaleMessage
from core.messages.to_rank import CloseChannel, Connect, Ready, SlabHeader


@dataclass
class SenderSession:
    """One receiver's channel as its sender knows it; `generation` 0 while there is none."""

    receiver: str
    incarnation: int = 0
    generation: int = 0
    next_sequence: int = 0

    @property
    def is_open(self) -> bool:
        """Whether slabs may be granted."""
        return self.generation > 0

    def connect(self, message: Connect) -> bool:
        """True: a channel of this generation is to be built, the older one is over. False: it stands already.

        Raises StaleMessage for a generation that another has replaced.
        """
        if self.is_open and self.incarnation == message.receiver_incarnation:
            if self.generation == message.generation:
                return False
            if self.generation > message.generation:
                raise StaleMessage(
                    f"generation {self.generation} replaced {message.generation} of {self.receiver}", field="generation"
                )
        self.incarnation, self.generation, self.next_sequence = message.receiver_incarnation, message.generation, 0
        return True

    def ready(self, message: Ready) -> Sequence[SlabHeader]:
        """The slabs that this grants, none when it had granted them before.

        Raises StaleMessage, field "generation", when it is meant for another channel or slabs between are missing.
        """
        if not self._is_this(message):
            raise StaleMessage(f"no channel to {self.receiver} of that generation", field="generation")
        first = message.slabs[0].sequence
        if first > self.next_sequence:
            raise StaleMessage(f"slab {first} granted, {self.next_sequence} expected", field="generation")
        if first < self.next_sequence:
            return ()
        self.next_sequence += len(message.slabs)
        return message.slabs

    def close(self, message: CloseChannel) -> bool:
        """Whether this ends the channel; that of another generation is left alone."""
        if not self._is_this(message):
            return False
        self.end()
        return True

    def end(self) -> None:
        """The channel failed, or made room."""
        self.generation = 0

    def _is_this(self, message: Ready | CloseChannel) -> bool:
        named = (message.receiver_incarnation, message.generation)
        return self.is_open and (self.incarnation, self.generation) == named
