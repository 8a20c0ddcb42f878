"""One sequence in the engine: what was asked, what it has so far, where its K and V stand. Only the loop touches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nanogpt.engine.messages import Finished, GenerateRequest, Tokens
from nanogpt.runner.base import Int32, SamplingState
from nanogpt.sampling_params import TokenLogprobs

if TYPE_CHECKING:
    from nanogpt.engine.grammar import GrammarState
    from nanogpt.runner.ngram import NgramProposer

Event = Tokens | Finished
Sink = Callable[[Event], None]
"""Called by the engine's thread with each event of one request; the last one is a Finished. Must not block or raise."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way.

    Its text is ``prompt + output``; its *context* is the text from ``window_start`` on (0 unless it was cropped).
    K and V of the context's first ``num_computed`` tokens lie in ``slot``. ``max_output_tokens`` is what the
    request and the context's length allow together.
    """

    handle: int
    request: GenerateRequest
    sink: Sink
    state: SamplingState
    prompt: Int32
    max_output_tokens: int
    stop_ids: frozenset[int]
    submitted_at: float
    deadline: float
    slot: int = -1
    window_start: int = 0
    num_computed: int = 0
    num_cached: int = 0
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    moved_at: float = 0.0
    """When the window last moved: the moment of the last token before."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    grammar: GrammarState | None = None
    proposer: NgramProposer | None = None
    """Made when the first guess is asked for."""
    paused: bool = False
    """Admission has paused for it once."""
    output: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.state.output_token_ids

    @property
    def num_left(self) -> int:
        """Tokens of the context that are still to be computed: one while decoding."""
        return len(self.prompt) + len(self.output) - self.window_start - self.num_computed

    def context(self, start: int, stop: int) -> Int32:
        """Token ids ``[start, stop)`` of the context."""
        start, stop = start + self.window_start, stop + self.window_start
        if stop <= len(self.prompt):
            return self.prompt[start:stop]
        output = np.array(self.output[max(0, start - len(self.prompt)) : stop - len(self.prompt)], np.int32)
        return output if start >= len(self.prompt) else np.concatenate([self.prompt[start:], output])
