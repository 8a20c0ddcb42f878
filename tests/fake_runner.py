"""A runner without a model that shows every mistake of the engine.

What it keeps for a position stands for K and V: it depends on the token, the position, and everything below it at the
moment it was computed. The next token depends on all of it, on the seed and on the output's index. So a slot mixed up,
a position computed twice or left out, or a wrong prefix gives other tokens than ``expected``, which has no slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanogpt.model.config import GPTConfig
from nanogpt.runner.base import Batch, Float32, Int32, SamplingState, StepOutput
from nanogpt.sampling_params import TokenLogprobs

_MASK = (1 << 64) - 1
_EMPTY = 0x9E3779B97F4A7C15


def config(block_size: int = 16, num_tokens: int = 50) -> GPTConfig:
    return GPTConfig(
        n_layer=1, n_head=1, n_embd=4, block_size=block_size, vocab_size=num_tokens + 3, num_tokens=num_tokens
    )


def _mix(*values: int) -> int:
    x = _EMPTY
    for value in values:
        x = ((x ^ (value & _MASK)) * 0xBF58476D1CE4E5B9) & _MASK
        x ^= x >> 29
    return x


def _layers(context: Sequence[int], below: list[int], start: int) -> None:
    """Append what is kept for ``context`` at ``start``, given what is kept below."""
    for position, token_id in enumerate(context, start):
        below.append(_mix(below[-1] if below else 0, token_id, position))


def _sample(kept: list[int], seed: int, index: int, num_tokens: int) -> int:
    return _mix(kept[-1], sum(kept), seed, index) % num_tokens


def expected(
    prompt: Sequence[int],
    *,
    seed: int,
    max_tokens: int,
    config: GPTConfig,
    crop: bool = False,
    stop_ids: Sequence[int] = (),
) -> tuple[list[int], str]:
    """What the fake model says to this prompt when it is alone: the output, and why it ended."""
    output: list[int] = []
    while True:
        context = [*prompt, *output]
        if len(context) > config.block_size and not crop:
            return output, "length"
        kept: list[int] = []
        _layers(context[-config.block_size :], kept, 0)
        token_id = _sample(kept, seed, len(output), config.num_tokens)
        if token_id in stop_ids:
            return output, "stop"
        output.append(token_id)
        if len(output) == max_tokens:
            return output, "length"


class ContractBroken(BaseException):
    """The engine asked for what no runner can do. No Exception: the engine must not take it for a failed step."""


def check(kept: bool, what: str) -> None:
    if not kept:
        raise ContractBroken(what)


class FakeRunner:
    """Keeps the protocol of ``nanogpt.runner.base.Runner``, and checks that the engine keeps its side."""

    device = "cpu"
    precision = "fp32"
    name = "fake"
    same_bits = True

    def __init__(self, config: GPTConfig, num_slots: int, *, max_batch_tokens: int | None = None) -> None:
        self.config = config
        self.num_slots = num_slots
        self.max_batch_tokens = max_batch_tokens
        self.kept: list[list[int]] = [[] for _ in range(num_slots)]
        self.num_computed_tokens = 0
        self.fail_next: Exception | None = None
        self.lost = False
        self.closed = False
        self.num_guesses = 0
        """How many further tokens each sequence gets in a step, as if a runner had guessed them rightly."""

    def step(self, batch: Batch) -> StepOutput:
        if self.lost:
            raise RuntimeError("the device is lost")
        n = len(batch.slots)
        check(n == len(batch.starts) == len(batch.num_tokens) == len(batch.sampling), "arrays of different lengths")
        check(n > 0 and batch.num_tokens.min() >= 1, "a sequence without tokens")
        check(batch.num_tokens.sum() == len(batch.token_ids), "token ids that belong to nobody")
        check(len(set(batch.slots.tolist())) == n, "one slot twice in a batch")
        check(self.max_batch_tokens is None or len(batch.token_ids) <= self.max_batch_tokens, "over the budget")
        for array in (batch.slots, batch.starts, batch.num_tokens, batch.token_ids):
            check(array.dtype == np.int32 and array.flags.c_contiguous, "not a contiguous int32 array")
        output = StepOutput(token_ids=[])
        at = 0
        for b in range(n):
            slot, start, count = int(batch.slots[b]), int(batch.starts[b]), int(batch.num_tokens[b])
            kept = self.kept[slot]
            check(start + count <= self.config.block_size, "past the context")
            check(start <= len(kept), "positions left out")
            del kept[start:]
            chunk = batch.token_ids[at : at + count].tolist()
            at += count
            _layers(chunk, kept, start)
            if batch.prompt_logprobs and b in batch.prompt_logprobs:
                wanted = batch.prompt_logprobs[b]
                check(count - 1 <= len(wanted.following) <= count, "following tokens that do not fit the chunk")
                output.prompt_logprobs[b] = [
                    TokenLogprobs(-float(token_id), 1, [(int(token_id), 0.0)] * wanted.num_top)
                    for token_id in wanted.following
                ]
            output.token_ids.append(self._draw(batch, b, kept, output))
        self.num_computed_tokens += len(batch.token_ids)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            for slot in batch.slots.tolist():  # half written: nothing that lies there means anything
                self.kept[slot] = [_mix(slot, position) for position in range(self.config.block_size)]
            raise error
        return output

    def _draw(self, batch: Batch, b: int, kept: list[int], output: StepOutput) -> list[int]:
        state = batch.sampling[b]
        num_drafts = 0 if batch.num_drafts is None else int(batch.num_drafts[b])
        check(0 <= num_drafts < batch.num_tokens[b], "more guesses than tokens")
        if state is None:
            check(not num_drafts, "guesses after a chunk")
            return []
        if num_drafts:
            return self._verify(batch, b, state, kept, num_drafts, output)
        new: list[int] = []
        for i in range(1 + (self.num_guesses if state.mask is None else 0)):
            if i:
                if len(kept) == self.config.block_size:
                    break
                _layers(new[-1:], kept, len(kept))
            index = len(state.output_token_ids) + i
            ids = self._allowed(state)
            new.append(int(ids[_sample(kept, state.seed, index, len(ids))]))
        if state.params.logprobs is not None:
            output.logprobs[b] = [TokenLogprobs(-float(t), 1, [(t, -float(t))] * state.params.logprobs) for t in new]
        return new

    def _verify(
        self, batch: Batch, b: int, state: SamplingState, kept: list[int], num_drafts: int, output: StepOutput
    ) -> list[int]:
        check(state.mask is None, "guesses under a mask")
        end = int(batch.num_tokens[: b + 1].sum())
        drafts = batch.token_ids[end - num_drafts : end].tolist()
        new: list[int] = []
        for i in range(num_drafts + 1):
            index = len(state.output_token_ids) + i
            below = kept[: len(kept) - num_drafts + i]
            new.append(_sample(below, state.seed, index, self.config.num_tokens))
            if i == num_drafts or new[-1] != drafts[i]:
                break
        if state.params.logprobs is not None:
            output.logprobs[b] = [TokenLogprobs(-float(t), 1, [(t, -float(t))] * state.params.logprobs) for t in new]
        return new

    def _allowed(self, state: SamplingState) -> Sequence[int] | npt.NDArray[np.int64]:
        if state.mask is None:
            return range(self.config.num_tokens)
        check(state.mask.dtype == np.uint32 and state.mask.flags.c_contiguous, "a mask that is none")
        bits = np.unpackbits(state.mask.view(np.uint8), bitorder="little")[: self.config.num_tokens]
        check(bits.any(), "a mask that allows nothing")
        return np.flatnonzero(bits)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        check(source != target, "a copy on itself")
        check(num_tokens <= len(self.kept[source]), "a copy of what was not computed")
        self.kept[target] = self.kept[source][:num_tokens]

    def logits(self, token_ids: Int32) -> Float32:
        if self.lost:
            raise RuntimeError("the device is lost")
        return np.zeros((len(token_ids), self.config.vocab_size), np.float32)

    def close(self) -> None:
        self.closed = True
