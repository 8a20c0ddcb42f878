"""Token ids to text as they come: whole characters only, and nothing past or of a stop string.

Owned by one request, used by one thread at a time. Knows nothing of engines or HTTP. The time is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nanogpt.errors import InvalidRequest
from nanogpt.tokenizer.base import Tokenizer

# The beginning of a character at the end of the bytes. Source: Unicode, table 3-7 (well-formed UTF-8). Python's own
# incremental decoder also waits after ED A0, which can never become a character.
_TORN = re.compile(
    rb"(?:[\xc2-\xdf]|\xe0[\xa0-\xbf]?|[\xe1-\xec\xee\xef][\x80-\xbf]?|\xed[\x80-\x9f]?"
    rb"|\xf0(?:[\x90-\xbf][\x80-\xbf]?)?|[\xf1-\xf3][\x80-\xbf]{0,2}|\xf4(?:[\x80-\x8f][\x80-\xbf]?)?)\Z"
)


class TextStream:
    """Give it tokens by ``push``, and at the end ``finish`` once: what both return, laid end to end, is the text.

    Without stop strings that is ``tokenizer.decode`` of all the tokens, however they were split over the pushes.
    The stop string that is complete first ends the text, wherever the tokens lie; among those that end at the same
    character it is the longest. It is not part of the text. ``stopped`` tells that one was found, in ``push`` or in
    ``finish``; what comes after it is not looked at.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.num_tokens = 0
        """Tokens so far, up to and including the one that completed a stop string."""
        self.offsets: list[int] = []
        """For each of them, how many characters there were before it. It may lie past the end of a stopped text."""
        self._token_bytes = tokenizer.token_bytes
        self._torn = b""
        self._stops = [_Stop(text) for text in ([stop] if isinstance(stop, str) else stop)]
        self._first_characters = {stop.text[0] for stop in self._stops}
        self._held = ""
        self._num_characters = 0
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All that was returned so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now and was not before."""
        pieces = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            self.offsets.append(self._num_characters)
            pieces.append(self._release(self._decode(self._token_bytes(token_id))))
        return self._returned("".join(pieces))

    def finish(self) -> str:
        """What was held back. The last character, if it is torn, is U+FFFD, which can complete a stop string too."""
        if self.stopped:
            return ""
        last = self._release(self._torn.decode("utf-8", errors="replace")) + self._held
        self._torn, self._held = b"", ""
        return self._returned(last)

    def _returned(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

    def _decode(self, piece: bytes) -> str:
        """Hold back the beginning of a character; what cannot be one any more is U+FFFD, as in a whole decode."""
        data = self._torn + piece
        torn = _TORN.search(data, max(0, len(data) - 3))
        end = torn.start() if torn else len(data)
        self._torn = data[end:]
        return data[:end].decode("utf-8", errors="replace")

    def _release(self, characters: str) -> str:
        """Look for stop strings in what follows the held text; hold back what can be the beginning of one."""
        self._num_characters += len(characters)
        if not self._held and self._first_characters.isdisjoint(characters):
            return characters
        text = self._held + characters
        for index, character in enumerate(characters, len(self._held) + 1):
            found = max(stop.follow(character) for stop in self._stops)
            if found:
                self.stopped = True
                self._held = ""
                return text[: index - found]
        end = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[end:]
        return text[:end]


class _Stop:
    """One stop string, searched a character at a time (Knuth, Morris and Pratt 1977).

    ``matched`` is the length of the longest end of the text so far that is a beginning of the stop string.
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise InvalidRequest("A stop string is empty.", field="stop")
        self.text = text
        self.matched = 0
        # borders[n]: the longest proper end of text[:n] that is a beginning of it, too.
        self._borders = [0] * (len(text) + 1)
        border = 0
        for end in range(1, len(text)):
            border = self._extend(border, text[end])
            self._borders[end + 1] = border

    def follow(self, character: str) -> int:
        """Take the next character. Returns the length of the stop string when it is complete now, else 0."""
        self.matched = self._extend(self.matched, character)
        return self.matched if self.matched == len(self.text) else 0

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched]
        return matched + 1 if self.text[matched] == character else 0
