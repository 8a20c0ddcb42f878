"""A random model of a few thousand weights, and steps on a runner without an engine. Needs no files.

Its weights are large, so that every token matters and an error in K, V or positions shows; its vocabulary is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nanogpt.checkpoint.types import Tensor
from nanogpt.model.config import GPTConfig
from nanogpt.runner.base import Batch, PromptLogprobs, Runner, SamplingState, StepOutput
from nanogpt.sampling_params import SamplingParams

NUM_TOKENS = 37


@dataclass(frozen=True)
class TinyCheckpoint:
    config: GPTConfig
    tensors: Mapping[str, Tensor]
    path: Path = Path("tiny_model.pt")
    name: str = "tiny_model"


def tiny_checkpoint(seed: int = 0, **changes: Any) -> TinyCheckpoint:
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 40}
    config = GPTConfig(**{**shape, "num_tokens": NUM_TOKENS, **changes})
    rng = np.random.default_rng(seed)
    tensors = {
        name: Tensor("float32", (rng.standard_normal(shape) * 0.5).astype(np.float32))
        for name, shape in config.tensor_shapes().items()
    }
    return TinyCheckpoint(config, MappingProxyType(tensors))


@dataclass
class Part:
    """What one sequence computes in a step."""

    slot: int
    token_ids: Sequence[int]
    start: int = 0
    state: SamplingState | None = None
    num_drafts: int = 0
    following: Sequence[int] | None = None


def step(runner: Runner, *parts: Part, num_top: int = 0) -> StepOutput:
    return runner.step(
        Batch(
            slots=np.array([part.slot for part in parts], np.int32),
            starts=np.array([part.start for part in parts], np.int32),
            num_tokens=np.array([len(part.token_ids) for part in parts], np.int32),
            token_ids=np.concatenate([np.array(part.token_ids, np.int32) for part in parts]),
            sampling=[part.state for part in parts],
            num_drafts=np.array([part.num_drafts for part in parts], np.int32),
            prompt_logprobs={
                b: PromptLogprobs(np.array(part.following, np.int32), num_top)
                for b, part in enumerate(parts)
                if part.following is not None
            },
        )
    )


def everything(prompt: Sequence[int] = (), seed: int = 0, **params: Any) -> SamplingState:
    """Sampling that reports the log probability of every token: a look at the logits through the protocol."""
    return SamplingState(SamplingParams(logprobs=NUM_TOKENS, **params), seed, prompt, [])


def distribution(output: StepOutput, b: int = 0, i: int = 0) -> np.ndarray[Any, Any]:
    """The log probabilities that ``everything`` asked for, by token id."""
    return np.array([logprob for _, logprob in sorted(output.logprobs[b][i].top)])


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Over the real tokens, in float64."""
    x = logits[..., :NUM_TOKENS].astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@dataclass
class Text:
    """A sequence that is generated on a runner directly, one token or one bundle of guesses a step."""

    runner: Runner
    slot: int
    prompt: list[int]
    params: SamplingParams
    seed: int = 0
    output: list[int] = field(default_factory=list)
    num_steps: int = 0

    def part(self, guesses: Sequence[int] = ()) -> Part:
        state = SamplingState(self.params, self.seed, self.prompt, self.output)
        new = [self.output[-1], *guesses] if self.output else self.prompt
        start = len(self.prompt) + len(self.output) - 1 if self.output else 0
        return Part(self.slot, new, start, state, len(guesses) if self.output else 0)

    def generate(self, num_tokens: int, oracle: Sequence[int] = (), num_guesses: int = 0) -> list[int]:
        """``oracle`` is where guesses are read from."""
        while len(self.output) < num_tokens:
            at = len(self.output)
            room = num_tokens - at - 1
            self.output += step(self.runner, self.part(oracle[at : at + min(num_guesses, room)])).token_ids[0]
            self.num_steps += 1
        return self.output
