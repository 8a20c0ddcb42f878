"""Speculation changes the speed of a text and nothing else: the engine with the CPU runner, with guesses and without.

Random batches of requests of every kind (greedy and seeded sampling, penalties, stop tokens, log probabilities,
prompts that share beginnings, texts that reach the context's end or go past it) give the same tokens, log
probabilities and endings, to the last bit, whatever is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nanogpt._kernels")

from native_support import kept_runner
from tiny_model import NUM_TOKENS

from nanogpt import grammars
from nanogpt.engine import speculation
from nanogpt.engine.core import Engine
from nanogpt.engine.messages import Finished, GenerateRequest
from nanogpt.engine.sequence import Event
from nanogpt.engine.stats import EngineStats
from nanogpt.llm import LLM
from nanogpt.sampling_params import SamplingParams, TokenLogprobs


@pytest.fixture(autouse=True, scope="module")
def look_however_short_steps_are() -> Iterator[None]:
    """``auto`` leaves a tiny model's steps alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "_LEAST_STEP_S", 0.0)
        yield


Told = tuple[list[int], list[TokenLogprobs], str, int]


def generate(speculate: str, requests: list[GenerateRequest], **options: Any) -> tuple[list[Told], EngineStats]:
    """All that a client is told of each request, but when."""
    engine = Engine(kept_runner("small", "int8", 1), max_queue=100, speculate=speculate, **options)
    events: list[list[Event]] = [[] for _ in requests]
    for request, to in zip(requests, events, strict=True):
        engine.submit(request, to.append)
    while engine.has_work():
        engine.step()
    told = []
    for *tokens, finished in events:
        assert isinstance(finished, Finished)
        ids = [token_id for event in tokens for token_id in event.token_ids]  # type: ignore[union-attr]
        logprobs = [entry for event in tokens for entry in event.logprobs or ()]  # type: ignore[union-attr]
        told.append((ids, logprobs, finished.reason, finished.num_output_tokens))
    return told, engine.stats()


params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.1]),
    logit_bias=st.sampled_from([None, {3: 4.0, 4: 4.0}]),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(st.integers(0, NUM_TOKENS - 1), max_size=2),
    logprobs=st.sampled_from([None, 0, 3]),
)
prompts = st.builds(
    lambda piece, times: (piece * times)[:20],
    st.lists(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=6),
    st.integers(1, 5),
)


@settings(max_examples=60)
@given(
    asked=st.lists(st.builds(GenerateRequest, prompts, params), min_size=1, max_size=8),
    speculate=st.sampled_from(["auto", "1", "3", "8"]),
    max_batch_size=st.integers(1, 8),
    max_batch_tokens=st.sampled_from([4, 16, 512]),
    prefix_cache=st.booleans(),
    context_overflow=st.sampled_from(["stop", "crop"]),
)
def test_tokens_logprobs_and_endings_do_not_depend_on_guesses(
    asked: list[GenerateRequest], speculate: str, **options: Any
) -> None:
    plain, _ = generate("off", asked, **options)
    guessed, _ = generate(speculate, asked, **options)
    assert guessed == plain


def test_guesses_save_steps() -> None:
    """A text that repeats itself: else the property above would hold for an engine that never guesses."""
    repeats = SamplingParams(max_tokens=18, temperature=0.0, logit_bias={3: 100.0})
    asked = [GenerateRequest([1, 2, 3, 3, 3, 3], repeats)]
    plain, without = generate("off", asked)
    for speculate in ("auto", "4"):
        guessed, stats = generate(speculate, asked)
        assert guessed == plain
        assert stats.num_accepted_tokens > 5
        assert stats.num_steps == without.num_steps - stats.num_accepted_tokens


@pytest.mark.parametrize("runner", ["native", "torch"])
def test_stop_strings_and_grammars_end_a_text_where_they_did(runner: str) -> None:
    """On the embedded model, as a program uses it. PyTorch's bits depend on the rows, so this is greedy there, too."""
    if runner == "torch":
        pytest.importorskip("torch")
    prompts = ["ROMEO:\nO, she doth teach the torches to burn bright! O, she doth", "JULIET:\nAy me! Ay me! Ay"]
    kinds = [
        SamplingParams(max_tokens=60, temperature=0.0, stop=["the "]),
        SamplingParams(max_tokens=60, temperature=0.0, stop=[" me", "\n\n"], logprobs=1),
        SamplingParams(max_tokens=60, temperature=0.0, grammar=grammars.from_regex("(me! Ay |no ){2,4}Exit")),
    ]
    told: dict[str, list[Any]] = {}
    accepted = 0
    for speculate in ("off", "4"):
        with LLM("", runner=runner, speculate=speculate, threads=1) as llm:
            made = [llm.generate(prompts, kind) for kind in kinds]
            told[speculate] = [(c.text, c.token_ids, c.finish_reason) for completions in made for c in completions]
            assert llm._engine is not None
            accepted = llm._engine.stats().num_accepted_tokens
    assert told["4"] == told["off"]
    assert accepted > 0
