"""Speculation: how many tokens are guessed in a step, and for whom. Owned by the engine's loop; knows no model.

A guess is one more row of the step. The runner samples at the place of each and keeps what it drew for as long as the
guesses agree with that, so guesses change the speed and nothing else. Whether they pay is arithmetic: where n sequences
take a step of ``step_s`` seconds and one more row takes ``row_s`` more, a row with the chance p of another token makes
it faster when

    p  >  row_s * n / step_s

Where reading the weights is nearly all of a step, that is little for one sequence and most of one for 32. Where
products are (a small model in the processor's cache, a processor with slow ones), it is much even for one. All of it is
measured: p by sequence and length of the match (``NgramProposer``), the times from the steps.
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
_LEAST_STEP_S = 0.0005
"""A step's time for each of its sequences below which nobody looks for guesses: a look takes up to 7 microseconds."""


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
        if adaptive and num_others:  # a prompt's rows leave nothing unused that a guess could use
            return None
        most = self._num_guesses or _MOST
        num_tokens = float(len(decoding))
        seconds, row_s = self._cost.of(len(decoding))
        if adaptive and seconds < _LEAST_STEP_S * num_tokens:
            return None
        found: list[list[int]] = []
        some = False
        worth = row_s * num_tokens / seconds if adaptive else -1.0
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
                seconds += len(guesses) * row_s
                num_tokens += proposer.chance(len(guesses))
                worth = row_s * num_tokens / seconds if adaptive else -1.0
        return found if some else None

    def proposer(self, sequence: Sequence) -> NgramProposer:
        return NgramProposer(sequence.prompt.tolist(), self._rates)

    def observe_step(self, num_sequences: int, num_guesses: int, seconds: float) -> None:
        """How long a step took in which everybody decoded."""
        self._cost.observe(num_sequences, num_guesses, seconds)


class StepCost:
    """What a step takes without guesses, by number of sequences, and what a guess adds to it.

    Until guesses were seen, and again when none were made for long, a guess is taken for a fifth of a sequence's step:
    so it is tried.
    """

    _USUAL = 0.2
    _STEP_WEIGHT, _ROW_WEIGHT, _FORGET = 0.1, 0.05, 0.0005

    def __init__(self) -> None:
        self._step_s: dict[int, float] = {}
        self._row_share: dict[int, float] = {}  # of a step, by the number of sequences in binary digits

    def of(self, num_sequences: int) -> tuple[float, float]:
        """Seconds of a step of so many, and of one more row."""
        step_s = self._step_s.get(num_sequences, 1.0)
        return step_s, step_s * self._row_share.get(num_sequences.bit_length(), self._usual(num_sequences))

    def observe(self, num_sequences: int, num_guesses: int, seconds: float) -> None:
        step_s = self._step_s.get(num_sequences)
        if step_s is None:
            if not num_guesses:
                self._step_s[num_sequences] = seconds
            return
        usual, size = self._usual(num_sequences), num_sequences.bit_length()
        share = self._row_share.get(size, usual)
        # A step that lost its core to somebody else tells nothing of rows.
        seconds = min(seconds, (2 + num_guesses * usual) * step_s)
        if num_guesses:
            seen = (seconds / step_s - 1) / num_guesses
            share += self._ROW_WEIGHT * num_guesses**0.5 * (seen - share)
        else:
            self._step_s[num_sequences] = step_s + self._STEP_WEIGHT * (seconds - step_s)
            share += self._FORGET * (usual - share)
        self._row_share[size] = max(share, 0.01 / num_sequences)

    def _usual(self, num_sequences: int) -> float:
        """A row's share of the step where nothing was measured: a fifth for one sequence, a 36th for 32."""
        return 1 / (1 / self._USUAL - 1 + num_sequences)


def make_speculation(setting: str, runner: Runner, max_batch_size: int) -> Speculation | None:
    """What the setting (``auto``, ``off`` or a number of guesses) means with this runner; None: no guesses."""
    if setting == "off":
        return None
    if setting == "auto" and not runner.same_bits:
        logger.debug("Speculation is off: the %s runner's last bits depend on the rows of a step.", runner.name)
        return None
    if runner.config.vocab_size > _MOST_ID:
        logger.info("Speculation is off: it knows token ids up to %d.", _MOST_ID)
        return None
    return Speculation(
        None if setting == "auto" else int(setting),
        max_guesses=max(_MOST, max_batch_size) if setting == "auto" else max_batch_size * int(setting),
        block_size=runner.config.block_size,
    )
