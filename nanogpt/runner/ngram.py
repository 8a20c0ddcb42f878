"""Guesses for speculation: what followed the last few tokens when they occurred before, in prompt or output.

Pure bookkeeping, one object a sequence, in the engine's thread; knows neither model nor batch. A wrong guess costs only
time: the runner samples at every guess's place and keeps what it drew, so the text is the same with and without.

A text is kept as a string with one character a token, so that looking back is ``str.rfind``: a microsecond or two, and
nothing for a token that nobody looks at. How often guesses come true is measured for each length of the match, also
while none are made: now and then, and more and more seldom while it finds nothing, what would have been guessed is
compared with what came.
"""

from __future__ import annotations

from collections.abc import Iterable

LENGTHS = (8, 4, 3, 2)
"""Tokens that have to match, the longest first. One token in common is a coincidence; past 8, length says little."""
_CLASS = {n: next(i for i, length in enumerate(LENGTHS) if length <= n) for n in range(LENGTHS[-1], LENGTHS[0] + 1)}
"""Which of ``LENGTHS`` a match of n tokens counts for: the longest that it reaches."""
START = 0.5
"""Share of guesses that come true, before anything was measured."""

_FARTHEST = 4096
"""Tokens that are looked through: a bound on the time of a look, for texts that a moving window lets grow."""
_PLACES = 6
"""Earlier occurrences of the last two tokens that are looked at for the longest match, from the latest on."""
_LOOK_EVERY, _LOOK_SELDOM = 4, 32
_WEIGHT = 0.06
_SHARED_WEIGHT = 0.005


class NgramProposer:
    """Proposes the continuation of the latest earlier occurrence of the text's end, for as far as that is likely.

    ``shared`` are the rates of all sequences together, by length: where this one's begin, and changed by what is seen.
    ``best`` is the highest of its own: nothing that it proposes is likelier than that.
    """

    def __init__(self, prompt_token_ids: Iterable[int], shared: list[float] | None = None) -> None:
        self._shared = [START] * len(LENGTHS) if shared is None else shared
        self._rates = list(self._shared)
        self.best = max(self._rates)
        self._prompt: Iterable[int] = prompt_token_ids
        self._text = ""
        self._num_output = -1  # tokens of the output that the text holds; -1: nor the prompt
        self._skipped, self._look_every = 0, _LOOK_EVERY
        self._looked: tuple[int, int, str] | None = None
        self._match = 0

    def propose(self, output: list[int], limit: int, worth: float) -> list[int]:
        """Guesses for the tokens after prompt and output, each with a chance above ``worth``; at most ``limit``."""
        self._follow(output)
        found = self._find()
        if found is None:
            return []
        self._match, at = found
        rate = self._rates[self._match]
        num_guesses, chance = 0, rate
        while num_guesses < limit and chance > worth:
            num_guesses += 1
            chance *= rate
        if not num_guesses:
            self._remember(found)
        return list(map(ord, self._continued(at, num_guesses)))

    def chance(self, num_guesses: int) -> float:
        """How many of the last proposal's guesses should come true."""
        rate = self._rates[self._match]
        return sum(rate**i for i in range(1, num_guesses + 1))

    def observe(self, num_guesses: int, num_right: int) -> None:
        """What the runner kept of the last proposal."""
        self._learn(self._match, num_right, num_right < num_guesses)

    def skip(self, output: list[int]) -> None:
        """No guesses this time: none is likely enough. Now and then one is made without consequences."""
        self._skipped += 1
        if self._skipped >= self._look_every:
            self._skipped = 0
            self._follow(output)
            found = self._find()
            self._remember(found)
            if found is None:
                self._look_every = min(2 * self._look_every, _LOOK_SELDOM)

    def _remember(self, found: tuple[int, int] | None) -> None:
        self._looked = None if found is None else (len(self._text), found[0], self._continued(found[1], 1))

    def _follow(self, output: list[int]) -> None:
        if self._num_output < 0:
            self._text = "".join(map(chr, self._prompt))
            self._num_output, self._prompt = 0, ()
        self._text += "".join(map(chr, output[self._num_output :]))
        self._num_output = len(output)
        if self._looked is not None:
            end, match, guess = self._looked
            if end < len(self._text):
                self._looked = None
                right = self._text[end] == guess
                self._learn(match, int(right), not right)
                self._look_every = _LOOK_EVERY if right else min(2 * self._look_every, _LOOK_SELDOM)

    def _find(self) -> tuple[int, int] | None:
        """Which length matches, and where what followed that match begins."""
        text, end = self._text, len(self._text)
        first = max(0, end - _FARTHEST)
        pair, longest, found = text[-2:], 1, 0
        at = text.rfind(pair, first, end - 1) if end > 2 else -1
        for _ in range(_PLACES):
            if at < 0:
                break
            n = 2
            while n < LENGTHS[0] and at + 1 - n >= first and text[at + 1 - n] == text[end - 1 - n]:
                n += 1
            if n > longest:
                longest, found = n, at + 2
                if n == LENGTHS[0]:
                    break
            at = text.rfind(pair, first, at + 1)
        return None if longest < 2 else (_CLASS[longest], found)

    def _continued(self, at: int, num: int) -> str:
        """``num`` tokens from ``at`` on. Where that passes the end, the text repeats itself from ``at``."""
        guesses = self._text[at : at + num]
        while len(guesses) < num:
            guesses += guesses[: num - len(guesses)]
        return guesses

    def _learn(self, match: int, num_right: int, wrong: bool) -> None:
        for rates, weight in ((self._rates, _WEIGHT), (self._shared, _SHARED_WEIGHT)):
            rate = 1 - (1 - rates[match]) * (1 - weight) ** num_right
            rates[match] = rate * (1 - weight) if wrong else rate
        self.best = max(self._rates)
