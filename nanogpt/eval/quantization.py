"""What int8 and int4 cost a model on a text, and which matrices have to stay in int8 for int4 to keep to a limit.

Computed by the CPU runner, as it would serve. Keeps and prints nothing: ``nanogpt quantize`` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogpt.checkpoint.types import Checkpoint
from nanogpt.errors import InvalidRequest, MissingDependency

try:
    from nanogpt.runner.native import NativeRunner, int4_bytes, matrix_names
except ImportError as error:
    raise MissingDependency(
        f"The native runner is not part of this installation ({error}).",
        remedy="Install a C++ compiler and then nano-gpt-api again.",
    ) from None
from nanogpt.runner.base import Batch, SamplingState
from nanogpt.sampling_params import SamplingParams

MIN_PREDICTIONS = 16
_ROWS = 64
_DECODED = 128


@dataclass(frozen=True)
class Measured:
    """``nats``: of each prediction. Speeds, in tokens a second: of scoring them, and of writing one text (or NaN)."""

    nats: npt.NDArray[np.float64]
    packed_bytes: int
    scored_per_s: float
    decoded_per_s: float

    @property
    def loss(self) -> float:
        return float(self.nats.mean())

    def perplexity_percent(self, base: Measured) -> float:
        """By how much this perplexity is above the other."""
        return 100 * math.expm1(self.loss - base.loss)

    def margin_percent(self, base: Measured) -> float:
        """Half of the 95 % interval of that, from the differences at each token."""
        difference = self.nats - base.nats
        return 196 * math.exp(difference.mean()) * float(difference.std()) / math.sqrt(len(difference))

    def row(self, base: Measured) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "perplexity_percent": self.perplexity_percent(base),
            "margin_percent": self.margin_percent(base),
            "packed_bytes": self.packed_bytes,
            "tokens_per_s": self.scored_per_s,
            "decode_tokens_per_s": self.decoded_per_s,
        }


class Scale:
    """Weighs one model on one text, in any mixture of precisions."""

    def __init__(self, checkpoint: Checkpoint, text: str, num_tokens: int, threads: int) -> None:
        ids = np.array(checkpoint.tokenizer.encode(text)[: num_tokens + 1], np.int32)
        if len(ids) <= MIN_PREDICTIONS:
            raise InvalidRequest(
                f"The text has {len(ids)} tokens; a loss needs {MIN_PREDICTIONS + 1} at least.", field="text"
            )
        self.names = matrix_names(checkpoint.config)
        self.num_predictions = len(ids) - 1
        self._checkpoint, self._ids, self._threads = checkpoint, ids, threads

    def whole(self, precision: str) -> Measured:
        """Every matrix in one precision."""
        return self._measure(precision)

    def mixed(self, int8: frozenset[str]) -> Measured:
        """These matrices in int8, the others in int4."""
        return self._measure("int4", int8)

    def saved_bytes(self, name: str) -> int:
        """What int4 saves of int8 at this matrix; 0 at narrow ones, whose groups are padded."""
        config = self._checkpoint.config
        return int4_bytes(config, [name]) - int4_bytes(config, [])

    def sensitivity(self, name: str, int8: Measured) -> float:
        """What a matrix costs by itself: int4, while all others are int8. In percent of perplexity."""
        others = frozenset(self.names) - {name}
        return self._measure("int4", others, decode=False).perplexity_percent(int8)

    def _measure(self, precision: str, int8: frozenset[str] = frozenset(), *, decode: bool = True) -> Measured:
        runner = NativeRunner(
            self._checkpoint,
            precision=precision,
            num_slots=1,
            threads=self._threads,
            int8_matrices=int8,
            cached=False,
        )
        try:
            nats, seconds = self._nats(runner)
            decoded_per_s = _decode_speed(runner) if decode else math.nan
            return Measured(nats, runner.packed_bytes, self.num_predictions / seconds, decoded_per_s)
        finally:
            runner.close()

    def _nats(self, runner: NativeRunner) -> tuple[npt.NDArray[np.float64], float]:
        """Of each prediction, over windows of the context's length; and how long the model took for them."""
        nats = np.empty(self.num_predictions)
        seconds, window = 0.0, runner.config.block_size
        for start in range(0, self.num_predictions, window):
            n = min(window, self.num_predictions - start)
            since = time.perf_counter()
            logits = runner.logits(self._ids[start : start + n])
            seconds += time.perf_counter() - since
            following = self._ids[start + 1 : start + n + 1]
            for i in range(0, n, _ROWS):
                part, next_ids = logits[i : i + _ROWS, : runner.config.num_tokens], following[i : i + _ROWS]
                top = part.max(axis=1)
                log_sum = top + np.log(np.exp(part - top[:, None]).sum(axis=1, dtype=np.float64))
                nats[start + i : start + i + len(part)] = log_sum - part[np.arange(len(part)), next_ids]
        return nats, seconds


def choose_int8(
    names: Sequence[str],
    sensitivity: Mapping[str, float],
    saved_bytes: Mapping[str, int],
    meets: Callable[[frozenset[str]], bool],
) -> frozenset[str] | None:
    """The matrices to keep in int8, so that the mixture meets the limit; None where not even all of them do.

    They move in the order of what int4 costs a byte that it saves, the dearest first; the shortest beginning of that
    order that ``meets`` is looked for by halves. Its last one may be so large that those before it are not needed any
    more: with that one kept, a second search gives back what it can. The whole mixture is measured each time, because
    what matrices cost together is not the sum of what they cost alone.
    """
    free = frozenset(name for name in names if saved_bytes[name] <= 0)  # int4 brings nothing there
    order = sorted(set(names) - free, key=lambda name: (-sensitivity[name] / saved_bytes[name], names.index(name)))
    if meets(free):
        return free
    if not meets(free.union(order)):
        return None
    count = _shortest(order, free, meets)
    kept = free.union(order[count - 1 : count])
    if meets(kept):
        return kept
    before = order[: count - 1]
    return kept.union(before[: _shortest(before, kept, meets)])


def _shortest(order: Sequence[str], kept: frozenset[str], meets: Callable[[frozenset[str]], bool]) -> int:
    """The least length at which a beginning of the order with ``kept`` meets; 0 does not, and all of it does."""
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        if meets(kept.union(order[:middle])):
            high = middle
        else:
            low = middle
    return high


def _decode_speed(runner: NativeRunner) -> float:
    """Tokens a second of one text, sampling included."""
    count = min(_DECODED, runner.config.block_size)
    one, token_ids = np.ones(1, np.int32), np.zeros(1, np.int32)
    output: list[int] = []
    state = SamplingState(SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), 1, [0], output)
    since = time.perf_counter()
    for position in range(count):
        step = runner.step(Batch(one - 1, one * position, one, token_ids, [state]))
        output += step.token_ids[0]
        token_ids[0] = output[-1]
    return count / (time.perf_counter() - since)
