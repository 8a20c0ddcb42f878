"""Which tokens a step trains on: a pure function of the seed and the step's number, so resuming needs no position.

All processes draw the same step and take their share, so a step of two processes is a step of one that accumulates
twice. Arrays are NumPy; the trainer moves them to its device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nanogpt.errors import InvalidRequest
from nanogpt.train.shards import ANSWER, FIRST, Shard, Tokens

Int64 = npt.NDArray[np.int64]
IGNORED = -1  # a target that does not count


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Shapes: inputs and targets ``[B, T]``. ``weight`` is its share of the step's loss; ``index`` its place in it."""

    inputs: Int64
    targets: Int64
    weight: float
    index: int = 0


class Batches(Protocol):
    """The micro batches of every step, and of validation."""

    def step(self, step: int, rank: int, world: int) -> Iterator[MicroBatch]:
        """The share of one process. The weights of all shares are 1 together."""
        ...

    def in_order(self, limit: int, rank: int, world: int) -> Iterator[MicroBatch]:
        """A split from its beginning, for validation: at most ``limit`` micro batches (0: all) over all processes.

        ``weight`` is the number of targets that count.
        """
        ...


class TextBatches:
    """Windows of a running text."""

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        block_size: int,
        batch_size: int,
        accumulation: int = 1,
        order: str = "random",
        seed: int = 0,
    ) -> None:
        longest = max((len(shard.tokens) for shard in shards), default=0)
        if longest < 2:
            raise InvalidRequest("The split holds fewer than two tokens.", remedy="Prepare more text.", field="data")
        # A validation text that is shorter than the context is read as it is.
        self._length = length = min(block_size, longest - 1)
        self._shards = [shard.tokens for shard in shards if len(shard.tokens) > length]
        self._batch_size, self._accumulation = batch_size, accumulation
        self._random, self._seed = order == "random", seed
        sizes = np.array([len(tokens) for tokens in self._shards])
        # Where a window may begin: at every token, or at every block_size-th.
        self._ends = np.cumsum(sizes - length if self._random else (sizes - 1) // length)

    @property
    def num_windows(self) -> int:
        return int(self._ends[-1])

    def step(self, step: int, rank: int, world: int) -> Iterator[MicroBatch]:
        size = self._batch_size * self._accumulation
        if self._random:
            windows = np.random.default_rng((self._seed, step)).integers(0, self.num_windows, size)
        else:
            windows = (np.arange(step * size, (step + 1) * size)) % self.num_windows
        for index in range(rank, self._accumulation, world):
            inputs, targets = self._read(windows[index * self._batch_size : (index + 1) * self._batch_size])
            yield MicroBatch(inputs, targets, 1 / self._accumulation, index)

    def in_order(self, limit: int, rank: int, world: int) -> Iterator[MicroBatch]:
        count = -(-self.num_windows // self._batch_size)
        for index in range(rank, min(count, limit or count), world):
            first = index * self._batch_size
            inputs, targets = self._read(np.arange(first, min(first + self._batch_size, self.num_windows)))
            yield MicroBatch(inputs, targets, float(targets.size), index)

    def _read(self, windows: Any) -> tuple[Int64, Int64]:
        """Windows by number. Shapes: ``[B]`` → two of ``[B, T]``."""
        homes = np.searchsorted(self._ends, windows, side="right")
        within = windows - np.concatenate(([0], self._ends))[homes]
        rows = np.empty((len(windows), self._length + 1), np.int64)
        for i, (home, start) in enumerate(zip(homes, within, strict=True)):
            start = start if self._random else start * self._length
            rows[i] = self._shards[home][start : start + self._length + 1]
        return rows[:, :-1], rows[:, 1:]


class InstructionBatches:
    """Examples, one a row, padded on the right; only answers count.

    An epoch takes every example once, in an order of its own. Examples longer than the context are cut on the right,
    and those whose answer lies behind the cut are left out.
    """

    def __init__(
        self, shards: Sequence[Shard], *, block_size: int, batch_size: int, accumulation: int = 1, seed: int = 0
    ) -> None:
        self._examples: list[Tokens] = []
        for shard in shards:
            starts = np.flatnonzero(shard.tokens & np.uint32(FIRST))
            self._examples += [
                example[: block_size + 1]
                for example in np.split(np.asarray(shard.tokens), starts[1:])
                if (example[1 : block_size + 1] & np.uint32(ANSWER)).any()
            ]
        if not self._examples:
            raise InvalidRequest(
                f"No example has an answer within {block_size} tokens.", remedy="Raise block_size.", field="block_size"
            )
        self._batch_size, self._accumulation, self._seed = batch_size, accumulation, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    def step(self, step: int, rank: int, world: int) -> Iterator[MicroBatch]:
        size = self._batch_size * self._accumulation
        chosen = [self._example(number) for number in range(step * size, (step + 1) * size)]
        groups = [chosen[i : i + self._batch_size] for i in range(0, size, self._batch_size)]
        counts = [sum(_counted(example) for example in group) for group in groups]
        for index in range(rank, self._accumulation, world):
            inputs, targets = _pad(groups[index])
            # By tokens and not by micro batches: a short answer's token would otherwise count more than a long one's.
            yield MicroBatch(inputs, targets, counts[index] / sum(counts), index)

    def in_order(self, limit: int, rank: int, world: int) -> Iterator[MicroBatch]:
        count = -(-len(self._examples) // self._batch_size)
        for index in range(rank, min(count, limit or count), world):
            group = self._examples[index * self._batch_size : (index + 1) * self._batch_size]
            yield MicroBatch(*_pad(group), float(sum(map(_counted, group))), index)

    def _example(self, number: int) -> Tokens:
        epoch, place = divmod(number, len(self._examples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._examples))
        return self._examples[int(self._order[place])]


def _counted(example: Tokens) -> int:
    return int(np.count_nonzero(example[1:] & np.uint32(ANSWER)))


def _pad(examples: Sequence[Tokens]) -> tuple[Int64, Int64]:
    length = max(map(len, examples)) - 1
    inputs = np.zeros((len(examples), length), np.int64)
    targets = np.full((len(examples), length), IGNORED, np.int64)
    for i, example in enumerate(examples):
        ids = (example & np.uint32(FIRST - 1)).astype(np.int64)
        inputs[i, : len(ids) - 1] = ids[:-1]
        targets[i, : len(ids) - 1] = np.where(example[1:] & np.uint32(ANSWER), ids[1:], IGNORED)
    return inputs, targets
