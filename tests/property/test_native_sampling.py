"""The C++ sampler draws the very tokens that the reference (nanogpt/runner/sampler.py) draws from the same logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("nanogpt._kernels")

from native_support import ISAS, kept_runner

from nanogpt.runner.base import Batch, SamplingState
from nanogpt.runner.sampler import sample, sampled_rows
from nanogpt.sampling_params import SamplingParams

NUM_TOKENS = 289  # of the shape "wide", whose vocabulary is padded to 300

ids = st.integers(0, NUM_TOKENS - 1)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-4, 0.3, 0.8, 1.0, 5.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 17, 18, 19, 50, 288, 289, 290, 10**6]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01, 0.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.one_of(
        st.none(), st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 2.0, 100.0, 1e38]), max_size=3)
    ),
)


def mask_of(allowed: set[int] | None) -> npt.NDArray[np.uint32] | None:
    if allowed is None:
        return None
    mask = np.zeros((NUM_TOKENS + 31) // 32, np.uint32)
    for i in allowed:
        mask[i // 32] |= np.uint32(1 << i % 32)
    return mask


@given(
    asked=st.lists(
        st.tuples(
            params,
            st.integers(-(2**63), 2**64 - 1),
            st.lists(ids, min_size=1, max_size=6),
            st.lists(ids, max_size=6),
            st.none() | st.sets(ids, min_size=1, max_size=40) | st.just(set(range(0, NUM_TOKENS, 2))),
        ),
        min_size=1,
        max_size=8,
    ),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 2),
)
def test_tokens_are_the_reference_samplers(
    asked: list[tuple[SamplingParams, int, list[int], list[int], set[int] | None]], isa: str, threads: int
) -> None:
    runner = kept_runner("wide", "int8", threads, isa)
    batch = Batch(
        slots=np.arange(len(asked), dtype=np.int32),
        starts=np.zeros(len(asked), np.int32),
        num_tokens=np.array([len(prompt) + len(output) for _, _, prompt, output, _ in asked], np.int32),
        token_ids=np.array([token for _, _, prompt, output, _ in asked for token in prompt + output], np.int32),
        sampling=[SamplingState(p, seed, prompt, output, mask_of(ids)) for p, seed, prompt, output, ids in asked],
    )
    drawn = [tokens for [tokens] in runner.step(batch).token_ids]
    logits = runner._running().logits()[:, : runner.config.vocab_size]
    assert drawn == sample(logits, sampled_rows(batch), runner.config.num_tokens)
    for (_, _, _, _, allowed), token_id in zip(asked, drawn, strict=True):
        assert allowed is None or token_id in allowed


@pytest.mark.parametrize(
    ("mask", "num_drafts", "error"),
    [
        (np.full(9, 2**32 - 1, np.uint32), None, "a bit for every token"),
        (np.full(10, 2**32 - 1, np.uint32), 1, "num_drafts must be 0"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: npt.NDArray[np.uint32], num_drafts: int | None, error: str) -> None:
    """Its words are addresses in C++. And it says what follows the output, not what follows a guess."""
    runner = kept_runner("wide", "int8", 1, ISAS[0])
    one = np.ones(1, np.int32)
    batch = Batch(
        slots=one - 1,
        starts=one - 1,
        num_tokens=one * 2,
        token_ids=np.array([3, 4], np.int32),
        sampling=[SamplingState(SamplingParams(), 1, [3, 4], [], mask)],
        num_drafts=None if num_drafts is None else one * num_drafts,
    )
    with pytest.raises(ValueError, match=error):
        runner.step(batch)
