"""The protocol of a runner: one model step for a batch of sequences. Knows nothing of requests or text.

A runner owns the K/V memory of ``num_slots`` slots of ``config.block_size`` positions. The engine decides what
a slot holds; the runner computes. All arrays are NumPy and C-contiguous, and are read only during the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nanogpt.model.config import GPTConfig
from nanogpt.sampling_params import SamplingParams
from nanogpt.sampling_params import TokenLogprobs as TokenLogprobs

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt32 = npt.NDArray[np.uint32]


@dataclass(slots=True)
class SamplingState:
    """What the sampler has to know of one sequence, kept over its steps.

    ``seed`` is the request's own or a fresh one. ``output_token_ids`` is the sequence's live list, appended to
    by the scheduler. The random number for an output token depends on ``seed`` and on its index in the output
    alone (a counter-based generator), so that a sequence gives the same text in any company: Philox4x32-10 with
    key (low, high half of ``seed`` mod 2**64) and counter (index, 0, 0, 0) gives the words r0 .. r3, and
    ``(r0 + 2**32 * r1 >> 11) / 2**53`` is the uniform number.

    ``mask`` (a grammar's) says which ids may be drawn next: bit ``i % 32`` of word ``i // 32`` is id i's, at least
    one is set, and bits from ``config.num_tokens`` on mean nothing. None: any id. It holds for one draw, so a
    sequence with a mask has no guesses, and its runner draws one token.
    """

    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: list[int]
    mask: UInt32 | None = None


@dataclass(slots=True)
class PromptLogprobs:
    """``following[i]`` is the prompt's token after the chunk's token i: its log probability is wanted, with ``num_top``
    alternatives. One shorter than the chunk where the chunk ends the prompt."""

    following: Int32
    num_top: int


@dataclass(slots=True)
class Batch:
    """One step. B sequences, N tokens in all, laid end to end in ``token_ids``.

    Sequence b computes ``num_tokens[b]`` tokens at positions ``starts[b] ..`` of its context; its slot already
    holds K and V of positions ``0 .. starts[b]``. ``sampling[b]`` is None while the sequence will still have
    tokens to compute after this step (a chunk of a long prompt); otherwise a token is sampled from the logits of
    its last token. ``num_drafts[b]`` of its last tokens are guesses (speculation): the runner samples at the
    position of each and keeps what it drew for as long as the guesses agree with it.
    ``prompt_logprobs`` asks for the log probabilities of a prompt's own tokens (echo), for some of the sequences.
    """

    slots: Int32
    starts: Int32
    num_tokens: Int32
    token_ids: Int32
    sampling: Sequence[SamplingState | None]
    num_drafts: Int32 | None = None
    prompt_logprobs: Mapping[int, PromptLogprobs] | None = None


@dataclass(slots=True)
class StepOutput:
    """``token_ids[b]`` lists what sequence b sampled: empty, one token, or several when guesses were right.

    ``logprobs[b]`` runs alongside where they were asked for; ``prompt_logprobs[b]`` runs alongside ``following``.
    """

    token_ids: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class Runner(Protocol):
    """Used by one thread at a time."""

    config: GPTConfig
    num_slots: int
    device: str
    """``cpu`` or ``cuda``, as ``/health`` shows it."""
    precision: str
    arithmetic: str
    """The precision in words: ``int4 with 7 of 49 matrices in int8`` where a plan says so."""
    int8_matrices: list[str] | None
    """Under int4: the matrices that stay in int8. Texts depend on them. None in any other precision."""
    name: str
    """``torch`` or ``native``."""
    same_bits: bool
    """Whether a row's logits have the same bits whatever else is in its step."""

    def step(self, batch: Batch) -> StepOutput:
        """Compute the batch's tokens, write their K and V, sample."""
        ...

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy K and V of the first positions of one slot to another."""
        ...

    def logits(self, token_ids: Int32) -> Float32:
        """Logits of every position of one text, outside all slots. Shapes: ``[T]`` → ``[T, V]``."""
        ...

    def close(self) -> None:
        """Give back memory and threads; the runner is not used again."""
        ...
