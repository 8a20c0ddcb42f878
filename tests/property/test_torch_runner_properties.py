"""However a text's tokens are dealt out over steps, slots and company, the runner computes the same.

Each example deals out some texts at random: prefixes copied from another text's slot, the rest in chunks of any size,
several texts in a step in any order. What it reports at each text's end is held against one uncached forward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import NUM_TOKENS, Part, Text, distribution, everything, log_softmax, step, tiny_checkpoint

from nanogpt.sampling_params import SamplingParams

torch = pytest.importorskip("torch")

from nanogpt.runner.torch import TorchRunner  # noqa: E402

RUNNERS: dict[str, TorchRunner] = {}


def runner(kind: str) -> TorchRunner:
    """One for all examples, so that slots are never clean."""
    if kind not in RUNNERS:
        RUNNERS[kind] = TorchRunner(tiny_checkpoint(), num_slots=6, threads=1)
        if kind == "graphs":
            RUNNERS[kind].use_graphs()
    return RUNNERS[kind]


tokens = st.lists(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=24)


@pytest.mark.parametrize("kind", ["a call each", "graphs"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunked_cached_copied_and_in_company_is_whole_uncached_and_alone(kind: str, data: st.DataObject) -> None:
    computes = runner(kind)
    texts = data.draw(st.lists(tokens, min_size=1, max_size=4), label="texts")
    prefix = data.draw(st.integers(0, len(texts[0]) - 1), label="tokens that the second text has from the first")
    if len(texts) > 1:
        texts[1] = [*texts[0][:prefix], *texts[1]][:24]
    slots = data.draw(st.permutations(range(6)), label="slots")
    done = [0] * len(texts)
    ends: dict[int, Any] = {}
    while len(ends) < len(texts):
        order = data.draw(st.permutations([b for b in range(len(texts)) if b not in ends]), label="order")
        parts = []
        there = done[0]
        for b in order:
            if b == 1 and prefix and done[1] == 0 and there >= prefix and prefix < len(texts[1]):
                computes.copy_prefix(slots[0], slots[1], prefix)
                done[1] = prefix
            n = data.draw(st.integers(1, len(texts[b]) - done[b]), label="chunk")
            last = done[b] + n == len(texts[b])
            parts.append(Part(slots[b], texts[b][done[b] : done[b] + n], done[b], everything() if last else None))
            done[b] += n
        output = step(computes, *parts)
        for i, b in enumerate(order):
            if done[b] == len(texts[b]):
                ends[b] = distribution(output, i)
    for b, text in enumerate(texts):
        expected = log_softmax(computes.logits(np.array(text, np.int32))[-1])
        np.testing.assert_allclose(ends[b], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["a call each", "graphs"])
@settings(max_examples=20, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=8), min_size=2, max_size=6),
       greedy=st.booleans(), seed=st.integers(0, 2**64 - 1))  # fmt: skip
def test_a_text_is_the_same_alone_and_in_a_batch(kind: str, prompts: list[list[int]], greedy: bool, seed: int) -> None:
    params = SamplingParams(temperature=0.0 if greedy else 1.0, top_k=0)
    computes = runner(kind)
    alone = [Text(computes, 0, prompt, params, seed + i).generate(8) for i, prompt in enumerate(prompts)]
    together = [Text(computes, i, prompt, params, seed + i) for i, prompt in enumerate(prompts)]
    for _ in range(8):
        output = step(computes, *(text.part() for text in together))
        for text, new in zip(together, output.token_ids, strict=True):
            text.output += new
    assert [text.output for text in together] == alone
