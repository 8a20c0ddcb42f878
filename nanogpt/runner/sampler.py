"""The reference sampler, in NumPy: what every other sampler is held against, and what runs wherever logits are in
the CPU's memory. Called by a runner from the engine's thread; keeps no state.

From a row of logits to a token, in this order (as ``SamplingParams`` lists it):

    drop padding → logit_bias → repetition → presence, frequency → mask → greedy? the largest
    → temperature → top_k → top_p → min_p → draw one of the kept ids with the sequence's own random number

What a mask (a grammar's) does not allow becomes -inf: it has no weight, and no filter can bring it back. Each filter
acts on what the one before it left. "The largest k" always means exactly k, ties broken by the lower id. The draw
inverts the cumulative distribution over the kept ids in ascending order, in float64, so that nothing depends on which
other rows are in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nanogpt.errors import NanoGPTError
from nanogpt.runner.base import Batch, Float32, SamplingState, StepOutput, UInt32
from nanogpt.runner.philox import uniforms
from nanogpt.sampling_params import TokenLogprobs

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_FEW = (512, 8192)
"""Nucleus: how many of the most probable ids are looked at before all of them are sorted."""
_LARGEST_BIAS = 1e30
"""A bias bans or forces an id, but pushes no logit to infinity."""


@dataclass(slots=True)
class Row:
    """One row of logits to sample from: its sequence, and the guesses (speculation) between the output and it.

    A row after guesses is sampled as if all of them had been drawn; ``collect`` keeps it only if they were.
    """

    sequence: int
    token: int
    state: SamplingState
    drafts: list[int]

    @property
    def output_index(self) -> int:
        return len(self.state.output_token_ids) + len(self.drafts)


def sampled_rows(batch: Batch) -> list[Row]:
    """The rows that a step samples, in the batch's order. ``Row.token`` is the token's place among the N tokens."""
    rows: list[Row] = []
    ends = np.cumsum(batch.num_tokens).tolist()
    num_drafts = [0] * len(ends) if batch.num_drafts is None else batch.num_drafts.tolist()
    for b, (state, end, n) in enumerate(zip(batch.sampling, ends, num_drafts, strict=True)):
        if state is None:
            continue
        if n == 0:
            rows.append(Row(b, end - 1, state, []))
            continue
        if state.mask is not None:
            raise ValueError("a mask is for one draw: num_drafts must be 0")
        drafts = batch.token_ids[end - n : end].tolist()
        rows += [Row(b, end - 1 - n + i, state, drafts[:i]) for i in range(n + 1)]
    return rows


def collect(batch: Batch, rows: Sequence[Row], drawn: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """What each sequence sampled, and which rows that came from: a row after a wrong guess does not count."""
    token_ids: list[list[int]] = [[] for _ in batch.sampling]
    kept: list[int] = []
    for i, (row, token_id) in enumerate(zip(rows, drawn, strict=True)):
        accepted = token_ids[row.sequence]
        if accepted == row.drafts:
            accepted.append(token_id)
            kept.append(i)
    return token_ids, kept


def step_output(
    batch: Batch, rows: Sequence[Row], drawn: Sequence[int], logits: Float32 | None, num_tokens: int
) -> StepOutput:
    """The step's answer. ``logits`` runs alongside ``rows``; it may be None when no row asks for log probabilities."""
    token_ids, kept = collect(batch, rows, drawn)
    output = StepOutput(token_ids)
    for i in kept:
        num_top = rows[i].state.params.logprobs
        if num_top is not None:
            assert logits is not None
            entry = token_logprobs(logits[i : i + 1], [drawn[i]], num_top, num_tokens)
            output.logprobs.setdefault(rows[i].sequence, []).extend(entry)
    return output


def sample(logits: Float32, rows: Sequence[Row], num_tokens: int) -> list[int]:
    """One token id for each row. Shapes: logits ``[R, V]``; ids from ``num_tokens`` on are padding."""
    logits = logits[:, :num_tokens]
    if len(rows) and not np.isfinite(logits.max()):
        raise not_finite()
    drawn: Int64 = np.empty(len(rows), np.int64)
    greedy: list[int] = []
    by_top_k: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        params = row.state.params
        if params.greedy:
            greedy.append(i)
        else:
            by_top_k.setdefault(_num_candidates(row, num_tokens), []).append(i)
    if greedy:
        drawn[greedy] = _adjusted(logits, rows, greedy).argmax(axis=1)
    for top_k, group in by_top_k.items():
        drawn[group] = _draw(_adjusted(logits, rows, group), top_k, [rows[i] for i in group])
    result: list[int] = drawn.tolist()
    return result


def not_finite() -> NanoGPTError:
    """The error of a step whose logits hold NaN or infinity."""
    return NanoGPTError(
        "The model computed logits that are not finite numbers.",
        remedy="With precision fp16 use bf16 or fp32; otherwise check the checkpoint with nanogpt inspect.",
    )


def token_logprobs(
    logits: Float32, token_ids: Sequence[int] | npt.NDArray[np.integer], num_top: int, num_tokens: int
) -> list[TokenLogprobs]:
    """Log probability, rank and alternatives of one token for each row. Shapes: logits ``[R, V]``, R tokens."""
    result = []
    top = largest(logits[:, :num_tokens], min(num_top, num_tokens)) if num_top else None
    for i, token_id in enumerate(token_ids):
        x = logits[i, :num_tokens].astype(np.float64)
        own = x[token_id]
        rank = 1 + int(np.count_nonzero(x > own)) + int(np.count_nonzero(x[:token_id] == own))
        highest = x.max()
        x -= highest + np.log(np.exp(x - highest).sum())
        alternatives: list[tuple[int, float]] = []
        if top is not None:
            best_first = top[i][np.argsort(-x[top[i]], kind="stable")]
            alternatives = list(zip(best_first.tolist(), x[best_first].tolist(), strict=True))
        result.append(TokenLogprobs(float(x[token_id]), rank, alternatives))
    return result


def largest(values: npt.NDArray[np.floating], k: int) -> Int64:
    """The ids of the k largest values of each row, ascending. Ties go to the lower id. Shapes: ``[R, V]`` → ``[R, k]``.

    The k-th largest of the maxima of more than k disjoint blocks bounds the k-th largest value from below, and few
    values reach it, so only those few are sorted.
    """
    num_rows, num_values = values.shape
    if k == num_values:
        return np.broadcast_to(np.arange(num_values), values.shape)
    block = max(1, num_values // (8 * k))
    num_blocks = num_values // block
    # Blocks are strided (i, i + num_blocks, …): the maximum then runs along whole cache lines.
    maxima = values[:, : num_blocks * block].reshape(num_rows, block, num_blocks).max(axis=1)
    bound = np.partition(maxima, num_blocks - k, axis=1)[:, num_blocks - k]
    row_of, ids = np.divmod(np.flatnonzero(values >= bound[:, None]), num_values)
    # Stable: equals stay in the order of their ids.
    order = np.lexsort((-values[row_of, ids], row_of))
    firsts = np.searchsorted(row_of, np.arange(num_rows))
    rank = np.arange(len(ids)) - firsts[row_of]
    chosen = order[rank < k]
    return np.sort(ids[chosen].reshape(num_rows, k), axis=1)


class Adjustment(NamedTuple):
    """What bias and penalties do to one row: ``x + bias``, over or times ``factor`` by its sign, minus ``penalty``."""

    ids: Int64
    bias: Float64
    factor: Float64
    penalty: Float64


def adjustment(row: Row) -> Adjustment | None:
    """The bias and penalties of one row, or None when there are none. Shapes: ``[n]`` each, for n distinct ids."""
    params = row.state.params
    penalize = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    repetition = params.repetition_penalty != 1.0
    if not (params.logit_bias or penalize or repetition):
        return None
    biased = np.array(list(params.logit_bias or ()), np.int64)
    prompt = np.asarray(row.state.prompt_token_ids if repetition else (), np.int64)
    output = np.array(row.state.output_token_ids + row.drafts, np.int64)
    ids, place = np.unique(np.concatenate([biased, prompt, output]), return_inverse=True)
    bias, factor, penalty = np.zeros(len(ids)), np.ones(len(ids)), np.zeros(len(ids))
    if params.logit_bias:
        bias[place[: len(biased)]] = np.clip(list(params.logit_bias.values()), -_LARGEST_BIAS, _LARGEST_BIAS)
    if repetition:
        factor[place[len(biased) :]] = params.repetition_penalty
    if penalize:
        counts = np.bincount(place[len(biased) + len(prompt) :], minlength=len(ids))
        penalty = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    return Adjustment(ids, bias, factor, penalty)


def forbidden(mask: UInt32, num_tokens: int) -> npt.NDArray[np.bool_]:
    """Which ids a mask does not allow. Shapes: ``[words]`` → ``[num_tokens]``."""
    octets = np.ascontiguousarray(mask, "<u4").view(np.uint8)
    return np.logical_not(np.unpackbits(octets, count=num_tokens, bitorder="little"))


def _adjusted(logits: Float32, rows: Sequence[Row], group: list[int]) -> Float32:
    """The group's rows with bias, penalties and masks. A copy where anything changes: logprobs want the model's own."""
    adjusted = logits if len(group) == len(logits) else logits[group]
    for at, i in enumerate(group):
        change, mask = adjustment(rows[i]), rows[i].state.mask
        if adjusted is logits and (change is not None or mask is not None):
            adjusted = logits.copy()
        if change is not None:
            x = adjusted[at, change.ids] + change.bias
            adjusted[at, change.ids] = np.where(x > 0, x / change.factor, x * change.factor) - change.penalty
        if mask is not None:
            adjusted[at, forbidden(mask, logits.shape[1])] = -np.inf
    return adjusted


def _num_candidates(row: Row, num_tokens: int) -> int:
    top_k, mask = row.state.params.top_k, row.state.mask
    if top_k and mask is not None:
        # Without a look at what is not allowed: the largest of 50,000 equals take a sort of them all.
        top_k = min(top_k, num_tokens - int(np.count_nonzero(forbidden(mask, num_tokens))))
    return min(top_k or num_tokens, num_tokens)


def _draw(logits: Float32, top_k: int, rows: Sequence[Row]) -> Int64:
    """Temperature and all that follows it, for rows of one top_k. Shapes: ``[G, V]`` → ``[G]``."""
    ids = largest(logits, top_k) if top_k < logits.shape[1] else None
    kept = (logits if ids is None else np.take_along_axis(logits, ids, axis=1)).astype(np.float64)
    # Differences to the largest logit are divided, so that no temperature, however small, overflows.
    kept -= kept.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        kept /= np.array([[row.state.params.temperature] for row in rows])
    weights = np.exp(kept, out=kept)
    for weight, row in zip(weights, rows, strict=True):
        params = row.state.params
        if params.top_p < 1.0:
            weight[~_nucleus(weight, params.top_p)] = 0.0
        if params.min_p > 0.0:
            weight[weight < params.min_p] = 0.0  # the most probable one weighs 1
    cumulative = weights.cumsum(axis=1)
    random = uniforms([row.state.seed for row in rows], [row.output_index for row in rows])
    targets = random * cumulative[:, -1]
    at = np.array([c.searchsorted(t, side="right") for c, t in zip(cumulative, targets, strict=True)])
    return at if ids is None else ids[np.arange(len(rows)), at]


def _nucleus(weights: Float64, top_p: float) -> npt.NDArray[np.bool_]:
    """The smallest set of the most probable ids whose share of the weight reaches ``top_p``, at least one."""
    goal = top_p * weights.sum()
    for few in (*(n for n in _FEW if n < len(weights)), len(weights)):
        ids = largest(weights[None], few)[0]
        best_first = ids[np.argsort(-weights[ids], kind="stable")]
        cumulative = weights[best_first].cumsum()
        if cumulative[-1] >= goal:
            break
    keep = np.zeros(len(weights), np.bool_)
    keep[best_first[: 1 + int(cumulative.searchsorted(goal, side="left"))]] = True
    return keep
