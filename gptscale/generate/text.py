"""A stream of bytes as a stream of text: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Holds back what cannot be shown yet: bytes of an unfinished character, and text that may begin a stop string.

    All that it hands out, joined, is `text`. Bytes that are no UTF-8 become U+FFFD; an unfinished character at the very
    end is dropped, for the model was cut off inside it.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        """A stop string has come; the text ends before it."""
        self._stop = tuple(stop)
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """Takes the next bytes; returns the text that can be shown now."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data)
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._undecided())

    def finish(self) -> str:
        """No more bytes will come: returns the text that was held back."""
        return "" if self.stopped else self._release(len(self._held))

    def _undecided(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        self.text += shown
        return shown
