"""Speculation: how many tokens are guessed in a step, and for whom. Owned by the engine's loop; knows no model.

A guess is one more row of the step. The runner samples at the place of each and keeps what it drew for as long as the
guesses agree with that, so guesses change the speed and nothing else. Whether they pay is arithmetic: a step of n rows
takes ``fixed + n`` (in units of what one row costs; ``fixed`` is reading the weights and all that does not depend on n)
and brings ``num_tokens`` tokens. One more row with the chance p to bring another one makes it faster when

    p  >  num_tokens / (fixed + n)

Alone, where reading the weights is nearly all of a step, that is little; among 32 it is most of one. Both sides are
measured: p by sequence and length of the match (``NgramProposer``), ``fixed`` from the times of the steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Collection

from nanogpt.engine.sequence import Sequence
from nanogpt.runner.base import Runner
from nanogpt.runner.ngram import LENGTHS, START, NgramProposer

logger = logging.getLogger("nanogpt.engine")

_MOST = 8
"""Guesses a sequence and step, when their number is ours to choose."""
_MOST_ID = 0x10FFFF
"""Proposers keep a token as a character."""


class Speculation:
    """``num_guesses`` of a sequence in each step: None chooses by what pays; a number is taken wherever there are some.

    ``max_guesses`` bounds a step's guesses of all sequences together, and so the memory that their logits take.
    """

    def __init__(self, num_guesses: int | None, *, max_guesses: int, block_size: int) -> None:
        self._num_guesses = num_guesses
        self._max_guesses = max_guesses
        self._block_size = block_size
        self._cost = StepCost()
        self._rates = [START] * len(LENGTHS)

    def guesses(self, decoding: Collection[Sequence], num_others: int, left: int) -> list[list[int]] | None:
        """Guesses for each of the sequences that decode; None when there are none at all.

        ``num_others`` tokens of others are in the step, and it may have ``left`` more.
        """
        left = min(left, self._max_guesses)
        if left <= 0 or not decoding:
            return None
        adaptive = self._num_guesses is None
        most = self._num_guesses or _MOST
        # Computing somebody's prompt is worth as much as it costs: a token a row.
        num_tokens = float(len(decoding) + num_others)
        cost = self._cost.fixed_rows + len(decoding) + num_others
        found: list[list[int]] = []
        some = False
        worth = num_tokens / cost if adaptive else -1.0
        for sequence in decoding:
            found.append([])
            if sequence.grammar is not None:  # its mask holds for one draw
                continue
            proposer, output = sequence.proposer, sequence.output
            if proposer is None:
                proposer = sequence.proposer = self.proposer(sequence)
            if proposer.best <= worth:
                proposer.skip(output)
                continue
            # The last token of an output is drawn, never computed; and the context has an end.
            room = min(sequence.max_output_tokens - len(output), self._block_size - sequence.num_computed) - 1
            guesses = proposer.propose(output, min(most, left, room), worth)
            if guesses:
                some = True
                found[-1] = guesses
                left -= len(guesses)
                cost += len(guesses)
                num_tokens += proposer.chance(len(guesses))
                worth = num_tokens / cost if adaptive else -1.0
        return found if some else None

    def proposer(self, sequence: Sequence) -> NgramProposer:
        return NgramProposer(sequence.prompt.tolist(), self._rates)

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """How long a step took in which everybody decoded."""
        self._cost.observe(num_rows, seconds)


class StepCost:
    """What a step takes, ``row_s * (fixed_rows + rows)``: least squares over the latest steps.

    Where all steps have the same number of rows they tell nothing of one row's cost: then ``_USUAL`` counts.
    """

    _USUAL = 4.0
    _WEIGHT = 0.02

    def __init__(self) -> None:
        self.fixed_rows = self._USUAL
        self._count = 0
        self._rows = self._seconds = self._variance = self._covariance = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        self._count += 1
        weight = max(self._WEIGHT, 1 / self._count)
        if self._count > 1:
            # A step that lost its core to somebody else tells nothing of rows.
            seconds = min(seconds, 3 * self._seconds)
        off, late = num_rows - self._rows, seconds - self._seconds
        self._rows += weight * off
        self._seconds += weight * late
        if self._count > 1:
            self._variance = (1 - weight) * (self._variance + weight * off * off)
            self._covariance = (1 - weight) * (self._covariance + weight * off * late)
        usual = self._seconds / (self._rows + self._USUAL)
        row_s = (self._covariance + usual) / (self._variance + 1)
        fixed = self._seconds / row_s - self._rows if row_s > 0 else 64.0
        self.fixed_rows = min(max(fixed, 0.5), 64.0)


def make_speculation(setting: str, runner: Runner, max_batch_size: int) -> Speculation | None:
    """What the setting (``auto``, ``off`` or a number of guesses) means with this runner; None: no guesses."""
    if setting == "off":
        return None
    if setting == "auto" and not runner.same_bits:
        logger.info("Speculation is off: the %s runner's last bits depend on the rows of a step.", runner.name)
        return None
    if runner.config.vocab_size > _MOST_ID:
        logger.info("Speculation is off: it knows token ids up to %d.", _MOST_ID)
        return None
    return Speculation(
        None if setting == "auto" else int(setting),
        max_guesses=max(_MOST, max_batch_size) if setting == "auto" else max_batch_size * int(setting),
        block_size=runner.config.block_size,
    )
