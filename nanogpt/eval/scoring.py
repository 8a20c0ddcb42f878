"""What every evaluation is made of: log probabilities of given tokens, by ``LLM.logits``. No sampling, no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from nanogpt.llm import LLM

Float64 = npt.NDArray[np.float64]

# 95 % of a normal distribution.
_Z: Final = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and the half width of its 95 % confidence interval: infinite where there is one observation alone."""

    mean: float
    margin: float
    count: int


def following_logprobs(llm: LLM, token_ids: Sequence[int]) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Log probability of every token but the first, and whether it was the likeliest. Padded ids do not count.

    Shapes: ``[T]`` → two of ``[T - 1]``; T is at most ``block_size + 1``.
    """
    ids = np.asarray(token_ids)
    logits = np.asarray(llm.logits(ids[:-1].tolist()), np.float64)[:, : llm.config.num_tokens]
    wanted = logits[np.arange(len(ids) - 1), ids[1:]]
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return wanted - log_sum, logits.argmax(axis=1) == ids[1:]


def continuation_logprobs(
    llm: LLM, context: Sequence[int], continuation: Sequence[int]
) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """The same for the tokens of a continuation. What does not fit the context is forgotten from the left."""
    ids = [*context, *continuation][-(llm.config.block_size + 1) :]
    logprobs, greedy = following_logprobs(llm, ids)
    return logprobs[-len(continuation) :], greedy[-len(continuation) :]


def start_tokens(llm: LLM) -> list[int]:
    """What stands before the first token of a text: the end-of-text token, where the model has one."""
    return [] if llm.tokenizer.eos_token_id is None else [llm.tokenizer.eos_token_id]


def estimate(values: Sequence[float] | npt.NDArray[Any], weights: Sequence[float] | None = None) -> Estimate:
    """The (weighted) mean of independent observations, and how far it may be off."""
    x = np.asarray(values, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    mean = float((x * w).sum() / w.sum())
    if len(x) < 2:
        return Estimate(mean, math.inf, len(x))
    # Of a ratio of sums: the residuals weighted as the mean weighs them.
    residuals = w * (x - mean)
    error = np.sqrt((residuals**2).sum() * len(x) / (len(x) - 1)) / w.sum()
    return Estimate(mean, float(_Z * error), len(x))
