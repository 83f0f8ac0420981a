"""Turns token ids into text one by one, never giving out half a character."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are not (yet) a character
_MAX_PENDING = 16  # tokens held before the settled part of an undecodable run is given out


class Detokenizer:
    """Incremental decoding of one output: the pieces join to `decode(all ids)`.

    A token's text may depend on its left neighbour (a leading space, a character of several tokens), so each step
    decodes a short window and gives out what came to it:

        window = [ shown ............ | pending ]      text = decode(window) minus decode(shown)

    The window moves on whenever its text ends in a whole character. `context` is the end of the prompt, so that
    prompt and output join as one text. Special tokens have no text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], special_ids: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._window = [token for token in context if token not in special_ids]
        if decode(self._window).endswith(_REPLACEMENT):
            self._window = []
        self._num_shown = len(self._window)
        self._shown = decode(self._window)

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that became certain; often, but not always, that token's."""
        if token in self._special_ids:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        num_pending = len(self._window) - self._num_shown
        if text.endswith(_REPLACEMENT):
            return self._show_settled(text) if num_pending >= _MAX_PENDING else ""
        if text == self._shown and num_pending < _MAX_PENDING:
            return ""
        return self._show(len(self._window), text)

    def finish(self) -> str:
        """The output ended: returns the rest, with replacement characters for bytes that never became a character."""
        return self._show(len(self._window), self._decode(self._window))

    def _show(self, end: int, text: str) -> str:
        """Gives out `text`, the decoded window up to `end`, less what was shown; the window then starts there."""
        if text.startswith(self._shown):
            new = text[len(self._shown) :]
        else:  # some decoders revise a run of byte tokens as a whole; what was shown stays
            new = self._decode(self._window[self._num_shown : end])
        self._window = self._window[self._num_shown :]
        self._num_shown = end - self._num_shown
        self._shown = self._decode(self._window[: self._num_shown])
        return new

    def _show_settled(self, text: str) -> str:
        """Gives out all but the end of an undecodable run, at a border where decoding does not cross it.

        A character has at most four bytes, so one of the last four borders between tokens is such a place.
        """
        for end in range(len(self._window) - 1, len(self._window) - 5, -1):
            left = self._decode(self._window[:end])
            if left + self._decode(self._window[end:]) == text:
                return self._show(end, left)
        return ""
