"""Ends a text at a stop string and holds back whatever may be the beginning of one."""

from collections.abc import Sequence


class StopStrings:
    """Cuts a text that arrives in pieces; the result does not depend on where the pieces were cut.

    The match that *completes* first wins, since generation would have ended there; of several that complete on the
    same character the longest wins. Neither the match nor anything after it is ever given out.

        text    ... some text <|e          stop "<|end|>"
        given   ... some text
        held                  <|e          given out later if the text goes on otherwise
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Takes the next piece and returns the text that is now certain not to belong to a stop string."""
        if self.found:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        safe = self._first_possible_start(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """The text ended: what was held back is ordinary text after all."""
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, text: str) -> int:
        """Index of the longest suffix of `text` that begins a stop string; len(text) if there is none."""
        longest = max(map(len, self._stops))
        for start in range(max(0, len(text) - longest + 1), len(text)):
            suffix = text[start:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return start
        return len(text)
