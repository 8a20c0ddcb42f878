"""Any parameters, any logits: the samplers do what SamplingParams says in words, and ``plain`` here in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.runner import sampler
from nanogpt.runner.base import SamplingState
from nanogpt.runner.philox import uniforms
from nanogpt.runner.sampler import Row, token_logprobs
from nanogpt.sampling_params import SamplingParams

torch = pytest.importorskip("torch")

from nanogpt.runner import sampler_torch  # noqa: E402

# Sixteenths are exact in float32 and make ties.
logit = st.integers(-64, 64).map(lambda n: n / 16)


def allows(state: SamplingState, token_id: int) -> bool:
    return state.mask is None or bool(int(state.mask[token_id // 32]) >> token_id % 32 & 1)


def mask_of(allowed: set[int], num_tokens: int) -> npt.NDArray[np.uint32]:
    """Bits past the vocabulary are set: they mean nothing."""
    bits = sum(1 << i for i in allowed) | -1 << num_tokens
    return np.array([bits >> at & 0xFFFFFFFF for at in range(0, num_tokens, 32)], np.uint32)


def plain(logits: list[float], state: SamplingState, drafts: list[int]) -> tuple[int, bool]:
    """The token, one id after the other in Python; and whether a hair's breadth could have changed it."""
    params, output = state.params, state.output_token_ids + drafts
    x = dict(enumerate(logits))
    for i, bias in (params.logit_bias or {}).items():
        x[i] += bias
    for i in {*state.prompt_token_ids, *output}:
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    for i in set(output):
        x[i] -= params.presence_penalty + params.frequency_penalty * output.count(i)
    x = {i: float(np.float32(value)) for i, value in x.items() if allows(state, i)}
    best_first = sorted(x, key=lambda i: (-x[i], i))
    if params.greedy:
        return best_first[0], False
    weight = {i: math.exp((x[i] - x[best_first[0]]) / params.temperature) for i in x}
    kept = best_first[: params.top_k] if params.top_k else best_first
    close = False
    if params.top_p < 1.0:
        total, reached, nucleus = sum(weight[i] for i in kept), 0.0, []
        for i in kept:
            if nucleus and reached >= params.top_p * total:
                break
            close |= math.isclose(reached, params.top_p * total, rel_tol=1e-9)
            nucleus.append(i)
            reached += weight[i]
        close |= math.isclose(reached, params.top_p * total, rel_tol=1e-9)
        kept = nucleus
    close |= any(math.isclose(weight[i], params.min_p, rel_tol=1e-9) for i in kept)
    kept = sorted(i for i in kept if weight[i] >= params.min_p)
    target = float(uniforms([state.seed], [len(output)])[0]) * sum(weight[i] for i in kept)
    reached = 0.0
    for i in kept:
        reached += weight[i]
        close |= math.isclose(reached, target, rel_tol=1e-9)
        if reached > target:
            return i, close
    return kept[-1], True


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], list[Row], int]:
    """Some rows of logits with padding, each with parameters of its own."""
    num_tokens = draw(st.integers(1, 40))
    token = st.integers(0, num_tokens - 1)
    num_rows = draw(st.integers(1, 4))
    rows, logits = [], []
    for i in range(num_rows):
        values: dict[str, Any] = {
            "temperature": draw(st.sampled_from([0.0, 0.1, 0.8, 1.0, 2.5])),
            "top_k": draw(st.integers(0, num_tokens + 2)),
            "top_p": draw(st.sampled_from([0.0, 0.2, 0.5, 0.95, 1.0])),
            "min_p": draw(st.sampled_from([0.0, 0.03, 0.4, 1.0])),
            "repetition_penalty": draw(st.sampled_from([0.5, 1.0, 2.0])),
            "presence_penalty": draw(st.sampled_from([-0.5, 0.0, 1.0])),
            "frequency_penalty": draw(st.sampled_from([-0.25, 0.0, 0.5])),
            "logit_bias": draw(st.none() | st.dictionaries(token, logit, max_size=3)),
        }
        prompt, output, drafts = (draw(st.lists(token, max_size=5)) for _ in range(3))
        seed = draw(st.integers(-(2**63), 2**64 - 1))
        allowed = draw(st.none() | st.sets(token, min_size=1))
        mask = None if allowed is None else mask_of(allowed, num_tokens)
        rows.append(Row(i, i, SamplingState(SamplingParams(**values), seed, prompt, output, mask), drafts))
        logits.append(draw(st.lists(logit, min_size=num_tokens, max_size=num_tokens)))
    return logits, rows, num_tokens


@settings(max_examples=300, deadline=None)
@given(cases())
def test_both_samplers_do_what_the_words_say(case: tuple[list[list[float]], list[Row], int]) -> None:
    logits, rows, num_tokens = case
    padded = np.pad(np.array(logits, np.float32), ((0, 0), (0, 3)), constant_values=100)
    reference = sampler.sample(padded, rows, num_tokens)
    on_device = sampler_torch.sample(torch.from_numpy(padded), rows, num_tokens).tolist()
    for i, row in enumerate(rows):
        expected, close = plain(logits[i], row.state, row.drafts)
        if not close:
            assert (reference[i], on_device[i]) == (expected, expected), row


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 40))
def test_log_probabilities_are_sorted_and_sum_to_one(case: tuple[list[list[float]], list[Row], int], num: int) -> None:
    logits, _, num_tokens = case
    padded = np.pad(np.array(logits, np.float32), ((0, 0), (0, 3)), constant_values=100)
    asked = [i % num_tokens for i in range(len(logits))]
    for x, token_id, entry in zip(logits, asked, token_logprobs(padded, asked, num, num_tokens), strict=True):
        assert len(entry.top) == min(num, num_tokens)
        assert entry.top == sorted(entry.top, key=lambda pair: (-x[pair[0]], pair[0]))
        assert sorted(range(num_tokens), key=lambda i, x=x: (-x[i], i)).index(token_id) == entry.rank - 1  # type: ignore[misc]
        if entry.rank <= num:
            assert entry.top[entry.rank - 1] == (token_id, entry.logprob)
        if num >= num_tokens:
            assert sum(math.exp(logprob) for _, logprob in entry.top) == pytest.approx(1.0)
