"""Guesses for speculation: what followed the last few tokens when they occurred before, in prompt or output.

Pure bookkeeping, one object a sequence, in the engine's thread; knows neither model nor batch. A wrong guess costs only
time: the runner samples at every guess's place and keeps what it drew, so the text is the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHORTEST, _LONGEST = 2, 4
"""Tokens that have to match. One match in two is a coincidence at length 1; past 4, length says little."""
_PROBE_EVERY = 32
"""While guesses do not pay, one attempt in so many tokens finds out whether they do by now."""
_PAYS = 0.4
"""Accepted guesses a guess, below which verifying costs more than it brings (verifying four costs half a step more)."""
_MEMORY = 0.9


class NgramProposer:
    """Proposes the continuation of the latest earlier occurrence of the text's end, for as long as that pays.

    ``accept`` is told what became of a proposal; the measured rate of accepted guesses (a moving average) decides
    how many are made next: none but a probe now and then where text does not repeat itself.
    """

    def __init__(self, token_ids: Sequence[int], max_guesses: int = 8) -> None:
        self._tokens: list[int] = []
        # Where an n-gram's latest occurrence ends, and where the one before that does.
        self._latest: dict[tuple[int, ...], int] = {}
        self._before: dict[tuple[int, ...], int] = {}
        self._max_guesses = max_guesses
        self._rate = 0.5
        self._silent = 0
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take note of tokens that were added to the text."""
        for token_id in token_ids:
            self._tokens.append(token_id)
            end = len(self._tokens)
            for n in range(_SHORTEST, min(_LONGEST, end) + 1):
                key = tuple(self._tokens[end - n :])
                if key in self._latest:
                    self._before[key] = self._latest[key]
                self._latest[key] = end

    def propose(self, limit: int) -> list[int]:
        """At most ``limit`` guesses for the tokens after the text; often none."""
        if self._rate < _PAYS:
            self._silent += 1
            if self._silent < _PROBE_EVERY:
                return []
            limit = min(limit, 2)
        self._silent = 0
        # Long proposals only while nearly all of them come true.
        limit = min(limit, max(1, round(self._max_guesses * self._rate)))
        end = len(self._tokens)
        for n in range(min(_LONGEST, end), _SHORTEST - 1, -1):
            at = self._before.get(tuple(self._tokens[end - n :]))
            if at is not None:
                return self._tokens[at : at + limit]
        return []

    def accept(self, num_proposed: int, num_accepted: int) -> None:
        """What the runner kept of a proposal."""
        if num_proposed:
            self._rate = _MEMORY * self._rate + (1 - _MEMORY) * num_accepted / num_proposed
