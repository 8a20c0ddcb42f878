"""The texts of one request, waited for together by its one thread: whatever comes first is handed on first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

from nanogpt.web.generation import LOOK_UP_S, TextGeneration


class _Ringing(SimpleQueue):  # type: ignore[type-arg]
    """One text's events; each of them rings the group's bell with the text's index."""

    def __init__(self, bell: SimpleQueue[int], index: int) -> None:
        super().__init__()
        self._bell = bell
        self._index = index

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self._bell.put(self._index)


class TextGroup:
    """Iterate for (index, piece of text) as they come, and (index, "") once a text's outcome is there.

    None: still nothing, after a while. Raises (from iteration): what a TextGeneration raises; then all have failed.
    """

    def __init__(self, silence_s: float, *texts: TextGeneration) -> None:
        """``texts`` of which there is one alone, accepted already; others are added."""
        self._silence_s = silence_s
        self._bell: SimpleQueue[int] = SimpleQueue()
        self.texts: list[TextGeneration] = list(texts)

    def next_events(self) -> _Ringing:
        """Where the news of the text goes that is added next."""
        return _Ringing(self._bell, len(self.texts))

    def add(self, text: TextGeneration) -> None:
        self.texts.append(text)

    def wait_accepted(self) -> None:
        for text in self.texts:
            text.wait_accepted()

    def run(self) -> None:
        """Wait for all texts."""
        for _ in self:
            pass

    def __iter__(self) -> Iterator[tuple[int, str] | None]:
        return self._of_one(self.texts[0]) if len(self.texts) == 1 else self._of_all()

    def _of_one(self, text: TextGeneration) -> Iterator[tuple[int, str] | None]:
        for piece in text:
            yield None if piece is None else (0, piece)
        yield 0, ""

    def _of_all(self) -> Iterator[tuple[int, str] | None]:
        last_sent = time.monotonic()
        num_left = len(self.texts)
        while num_left:
            try:
                ringing = [self._bell.get(timeout=min(LOOK_UP_S, self._silence_s))]
            except Empty:
                ringing = list(range(len(self.texts)))  # each looks up from its wait, and at its deadline
            for index in ringing:
                text = self.texts[index]
                if text.outcome is not None:
                    continue
                piece = text.advance(0.0)
                if piece:
                    yield index, piece
                    last_sent = time.monotonic()
                if text.complete:
                    text.advance(0.0)
                    num_left -= 1
                    yield index, ""
                    last_sent = time.monotonic()
            if time.monotonic() - last_sent >= self._silence_s:
                yield None
                last_sent = time.monotonic()

    def close(self) -> None:
        """End those that still run. May be called at any time, and again."""
        for text in self.texts:
            text.close()

    # -- as one: for the log

    @property
    def num_tokens(self) -> int:
        return sum(text.num_tokens for text in self.texts)

    @property
    def ttft_s(self) -> float | None:
        return min((text.ttft_s for text in self.texts if text.ttft_s is not None), default=None)

    @property
    def finish_reason(self) -> str | None:
        """That of the first text, once all have ended."""
        outcomes = [text.outcome for text in self.texts]
        return outcomes[0].finish_reason if outcomes[0] is not None and None not in outcomes else None

    @property
    def queue_s(self) -> float | None:
        """The longest wait of any of them."""
        return max((text.queue_s for text in self.texts if text.queue_s is not None), default=None)
