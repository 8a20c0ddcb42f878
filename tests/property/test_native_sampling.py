"""The C++ sampler draws the very tokens that the reference (nanogpt/runner/sampler.py) draws from the same logits."""

from __future__ import annotations

import numpy as np
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


@given(
    asked=st.lists(
        st.tuples(
            params, st.integers(-(2**63), 2**64 - 1), st.lists(ids, min_size=1, max_size=6), st.lists(ids, max_size=6)
        ),
        min_size=1,
        max_size=8,
    ),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 2),
)
def test_tokens_are_the_reference_samplers(
    asked: list[tuple[SamplingParams, int, list[int], list[int]]], isa: str, threads: int
) -> None:
    runner = kept_runner("wide", "int8", threads, isa)
    batch = Batch(
        slots=np.arange(len(asked), dtype=np.int32),
        starts=np.zeros(len(asked), np.int32),
        num_tokens=np.array([len(prompt) + len(output) for _, _, prompt, output in asked], np.int32),
        token_ids=np.array([token for _, _, prompt, output in asked for token in prompt + output], np.int32),
        sampling=[SamplingState(p, seed, prompt, output) for p, seed, prompt, output in asked],
    )
    drawn = [tokens for [tokens] in runner.step(batch).token_ids]
    logits = runner._running().logits()[:, : runner.config.vocab_size]
    assert drawn == sample(logits, sampled_rows(batch), runner.config.num_tokens)
