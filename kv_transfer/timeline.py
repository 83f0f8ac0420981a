"""What a rank did for which request and when, the latest of it; TimelineEvent names the phases. Pure.

Moments are of the machine's monotonic clock, so timelines of processes of one host can be laid side by side.
"""

from collections import deque

from core.messages.to_rank import TimelineEvent


class Timeline:
    """Remembers a bounded number of events."""

    def __init__(self, limit: int = 8192) -> None:
        self._events: deque[TimelineEvent] = deque(maxlen=limit)

    def add(self, event: TimelineEvent) -> None:
        """One more, at its end."""
        self._events.append(event)

    def of(self, request_id: str) -> tuple[TimelineEvent, ...]:
        """A request's events in order of their ends; of all requests when it is empty."""
        return tuple(event for event in self._events if not request_id or event.request_id == request_id)
