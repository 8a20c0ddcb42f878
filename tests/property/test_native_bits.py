"""The CPU runner's promise: a row's logits have the same bits in any company, on any instruction set and any threads.

Each example deals out some texts at random (prefixes copied from another slot, the rest in chunks, several texts a step
in any order) to a runner with slots that were used before, and compares bits with one thread of plain C++ that computes
each text alone and at once.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nanogpt._kernels")

from native_support import ISAS, PRECISIONS, SHAPES, bits, kept_runner
from tiny_model import NUM_TOKENS, Text, step

from nanogpt.runner.native import NativeRunner
from nanogpt.sampling_params import SamplingParams


def last_logits(runner: NativeRunner, parts: list[tuple[int, int, list[int], bool]]) -> list[np.ndarray]:
    """One step of (slot, start, tokens, whether the last row's logits are wanted)."""
    model = runner._running()
    tokens = np.array([token for part in parts for token in part[2]], np.int32)
    lengths = np.array([len(part[2]) for part in parts], np.int32)
    slots, starts = (np.array([part[i] for part in parts], np.int32) for i in (0, 1))
    model.step(slots, starts, lengths, tokens, [None] * len(parts), None)
    rows = np.cumsum(lengths, dtype=np.int32)[[part[3] for part in parts]] - 1
    return list(model.head(np.ascontiguousarray(rows, np.int32)).copy())


@settings(max_examples=120)
@given(data=st.data())
def test_bits_do_not_depend_on_company_chunks_prefixes_threads_or_instructions(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(sorted(SHAPES)))
    precision = data.draw(st.sampled_from(PRECISIONS))
    runner = kept_runner(
        shape, precision, data.draw(st.integers(1, 3), label="threads"), data.draw(st.sampled_from(ISAS))
    )
    plain = kept_runner(shape, precision, 1, "portable")
    longest = min(runner.config.block_size, 150)
    tokens = st.integers(0, runner.config.num_tokens - 1)
    seeds = st.lists(tokens, min_size=1, max_size=8)
    lengths = st.one_of(st.integers(1, 8), st.integers(1, longest))
    # A long text is a short one over and over: Hypothesis draws and shrinks it quickly.
    texts = [
        np.resize(data.draw(seeds), data.draw(lengths)).tolist()
        for _ in range(data.draw(st.integers(1, 5), label="texts"))
    ]
    prefix = data.draw(st.integers(0, len(texts[0]) - 1), label="tokens that the second text has from the first")
    if len(texts) > 1:
        texts[1] = [*texts[0][:prefix], *texts[1]][:longest]
    slots = data.draw(st.permutations(range(8)), label="slots")
    done = [0] * len(texts)
    ends: dict[int, np.ndarray] = {}
    while len(ends) < len(texts):
        order = data.draw(st.permutations([b for b in range(len(texts)) if b not in ends]), label="order")
        order = order[: data.draw(st.integers(1, len(order)), label="how many")]
        if 1 in order and prefix and done[1] == 0 and done[0] >= prefix and prefix < len(texts[1]):
            runner.copy_prefix(slots[0], slots[1], prefix)
            done[1] = prefix
        parts = []
        for b in order:
            n = data.draw(st.integers(1, len(texts[b]) - done[b]), label="chunk")
            parts.append((slots[b], done[b], texts[b][done[b] : done[b] + n], done[b] + n == len(texts[b])))
            done[b] += n
        finished = [b for b in order if done[b] == len(texts[b])]
        ends.update(zip(finished, last_logits(runner, parts), strict=True))
    for b, text in enumerate(texts):
        [alone] = last_logits(plain, [(0, 0, text, True)])
        np.testing.assert_array_equal(bits(ends[b]), bits(alone))


@settings(max_examples=40)
@given(
    prompts=st.lists(st.lists(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=8), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
    wrong=st.lists(st.booleans(), min_size=12, max_size=12),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
)
def test_speculation_gives_the_same_text(
    prompts: list[list[int]], temperature: float, penalty: float, seed: int, wrong: list[bool], isa: str, threads: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=0, repetition_penalty=penalty)
    plain, runner = kept_runner("small", "int8", 1, "portable"), kept_runner("small", "int8", threads, isa)
    for i, prompt in enumerate(prompts):
        text = Text(plain, 0, prompt, params, seed + i).generate(12)
        guesses = [token ^ 1 if flip else token for token, flip in zip(text, wrong, strict=True)]
        guessed = Text(runner, i, prompt, params, seed + i)
        assert guessed.generate(12, oracle=guesses, num_guesses=3) == text
        if not any(wrong):
            assert guessed.num_steps < 12


@settings(max_examples=20)
@given(prompts=st.lists(st.lists(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=8), min_size=2, max_size=8),
       greedy=st.booleans(), seed=st.integers(0, 2**64 - 1))  # fmt: skip
def test_a_text_is_the_same_alone_and_in_a_batch(prompts: list[list[int]], greedy: bool, seed: int) -> None:
    params = SamplingParams(temperature=0.0 if greedy else 1.0, top_k=0)
    runner = kept_runner("small", "int8", 2)
    alone = [Text(runner, 0, prompt, params, seed + i).generate(8) for i, prompt in enumerate(prompts)]
    together = [Text(runner, i, prompt, params, seed + i) for i, prompt in enumerate(prompts)]
    for _ in range(8):
        output = step(runner, *(text.part() for text in together))
        for text, new in zip(together, output.token_ids, strict=True):
            text.output += new
    assert [text.output for text in together] == alone
