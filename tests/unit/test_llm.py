"""The Python API on a small real checkpoint: what its users rely on, whatever computes below."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nanogpt
from nanogpt import LLM, Completion, SamplingParams, batch_generate, grammars, load_model_from_checkpoint
from nanogpt.engine.messages import Finished, Tokens
from nanogpt.errors import InvalidRequest, NanoGPTError, SettingsError, UnknownCharacter
from nanogpt.llm import _Request
from nanogpt.sampling_params import TokenLogprobs
from nanogpt.tokenizer.text import TextStream

pytest.importorskip("torch")

PROMPTS = ["ROMEO:", "What", "To be, or not to be", "\n", "KING"]
SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, seed=5)


def load(shared_checkpoints: Path, name: str = "01b_nanogpt_char_tiny", **options: Any) -> LLM:
    return LLM(shared_checkpoints / name, **{"runner": "torch", "device": "cpu", "threads": 1, **options})


@pytest.fixture(scope="module")
def llm(shared_checkpoints: Path) -> Iterator[LLM]:
    with load(shared_checkpoints) as model:
        yield model


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    assert not llm._running().has_work(), "a request outlived its caller"
    assert not llm._open


# -- generate ------------------------------------------------------------------------------------------------------


def test_completions_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    completions = llm.generate(PROMPTS, [dataclasses.replace(SAMPLED, max_tokens=n) for n in (9, 1, 24, 3, 5)])
    assert [c.prompt for c in completions] == PROMPTS
    assert [len(c.token_ids) for c in completions] == [9, 1, 24, 3, 5]
    for c in completions:
        assert llm.tokenizer.decode(c.token_ids) == c.text
        assert c.full_text == c.prompt + c.text
        assert (c.finish_reason, c.num_prompt_tokens) == ("length", len(c.prompt))


def test_prompts_may_be_texts_or_token_ids_one_or_many(llm: LLM) -> None:
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [c.text for c in llm.generate(PROMPTS, SAMPLED)]
    assert [c.text for c in llm.generate(ids, SAMPLED)] == expected
    assert [c.prompt for c in llm.generate(ids, SAMPLED)] == PROMPTS
    assert [c.text for c in llm.generate([ids[0], *PROMPTS[1:]], SAMPLED)] == expected
    for one in (PROMPTS[0], ids[0], tuple(ids[0]), np.array(ids[0]), [PROMPTS[0]], [np.array(ids[0])]):
        assert [c.text for c in llm.generate(one, SAMPLED)] == expected[:1]
    assert llm.generate([], SAMPLED) == []


def test_a_seed_gives_the_same_text_alone_and_in_company(llm: LLM) -> None:
    together = llm.generate(PROMPTS, SAMPLED)
    assert [llm.generate(prompt, SAMPLED)[0].text for prompt in PROMPTS] == [c.text for c in together]


def test_without_a_seed_texts_differ(llm: LLM) -> None:
    assert len({c.text for c in llm.generate(["ROMEO:"] * 4, SamplingParams(max_tokens=24))}) == 4


def test_more_prompts_than_fit_into_the_batch(shared_checkpoints: Path, llm: LLM) -> None:
    with load(shared_checkpoints, max_batch_size=2, max_batch_tokens=5) as small:
        assert [c.text for c in small.generate(PROMPTS, SAMPLED)] == [c.text for c in llm.generate(PROMPTS, SAMPLED)]


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(llm: LLM) -> None:
    (whole,) = llm.generate("ROMEO:", SAMPLED)
    stop = whole.text[6:9]
    (stopped,) = llm.generate("ROMEO:", dataclasses.replace(SAMPLED, stop=[stop, "never seen"]))
    end = whole.text.index(stop)
    assert (stopped.text, stopped.finish_reason) == (whole.text[:end], "stop")
    assert stopped.token_ids == whole.token_ids[: end + len(stop)], "up to the token that completed it"


def test_nothing_is_computed_after_a_stop_string(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = dataclasses.replace(SAMPLED, logprobs=0)
    (whole,) = llm.generate("ROMEO:", params)
    num_steps, step = [0], llm._runner.step

    def counting(batch: Any) -> Any:
        num_steps[0] += 1
        return step(batch)

    monkeypatch.setattr(llm._runner, "step", counting)
    (stopped,) = llm.generate("ROMEO:", dataclasses.replace(params, stop=whole.text[6:9]))
    assert num_steps[0] == len(stopped.token_ids)
    assert stopped.logprobs is not None
    assert whole.logprobs is not None
    assert stopped.logprobs == whole.logprobs[: len(stopped.token_ids)]


def test_tokens_that_come_with_the_one_that_stops_do_not_count(llm: LLM) -> None:
    """With speculation an engine reports several tokens at once, and the stop string may end among the first."""
    params = SamplingParams(stop="b", logprobs=0)
    request = _Request("", [0], params, TextStream(llm.tokenizer, params.stop))
    aborted: list[int] = []
    request.engine, request.handle = SimpleNamespace(abort=aborted.append), 7  # type: ignore[assignment]
    ids = llm.tokenizer.encode("aabaa")
    request.receive(Tokens(ids, [TokenLogprobs(-float(i), 1, []) for i in range(5)]))
    request.receive(Finished("abort", 1, 5))
    completion = request.completion()
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("aa", ids[:3], "stop")
    assert completion.logprobs is not None
    assert [entry.logprob for entry in completion.logprobs] == [0.0, -1.0, -2.0]
    assert aborted == [7]


def test_a_stop_token_ends_the_text(llm: LLM) -> None:
    (whole,) = llm.generate("ROMEO:", SAMPLED)
    token_id = whole.token_ids[7]
    (stopped,) = llm.generate("ROMEO:", dataclasses.replace(SAMPLED, stop_token_ids=[token_id]))
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(token_id)]
    assert stopped.finish_reason == "stop"


def test_log_probabilities(llm: LLM) -> None:
    params = dataclasses.replace(SAMPLED, logprobs=3, prompt_logprobs=2)
    (c,) = llm.generate("ROMEO:", params)
    assert c.logprobs is not None
    assert c.prompt_logprobs is not None
    ids = c.prompt_token_ids + c.token_ids
    logits = llm.logits(ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    entries = c.prompt_logprobs + list(c.logprobs)
    assert len(entries) == len(ids)
    assert entries[0] is None
    for i, entry in enumerate(entries[1:], 1):
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[i - 1, ids[i]], abs=1e-5)
        assert len(entry.top) == (2 if i < len(c.prompt_token_ids) else 3)
    assert llm.generate("ROMEO:", SAMPLED)[0].logprobs is None


def test_an_empty_prompt_starts_from_a_line_break_or_from_the_end_of_a_text(llm: LLM, shared_checkpoints: Path) -> None:
    (c,) = llm.generate("", SAMPLED)
    assert (c.prompt, c.prompt_token_ids, c.full_text) == ("", llm.tokenizer.encode("\n"), c.text)
    with load(shared_checkpoints, "02_nanogpt_bpe/ckpt.pt") as bpe:
        assert bpe.generate("", SAMPLED)[0].prompt_token_ids == [50256]


def test_at_the_end_of_the_context(llm: LLM, shared_checkpoints: Path) -> None:
    size = llm.config.block_size
    params = SamplingParams(max_tokens=30, temperature=0.0)
    prompt = [i % 60 for i in range(size - 4)]
    (stopped,) = llm.generate(prompt, params)
    assert (len(stopped.token_ids), stopped.finish_reason) == (5, "length")
    with pytest.raises(InvalidRequest, match=f"{size + 1} tokens, but the model's context holds {size}"):
        llm.generate([1] * (size + 1))
    with load(shared_checkpoints, context_overflow="crop") as cropping:
        (cropped,) = cropping.generate(prompt, params)
        (long,) = cropping.generate([3] * 10 + prompt, params)
    expected = list(prompt)
    for _ in range(30):  # as nanoGPT's generate does
        expected.append(int(llm.logits(expected[-size:])[-1].argmax()))
    assert prompt + cropped.token_ids == expected
    assert len(long.token_ids) == 30


# -- stream --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), ("e",), ("the",), ("\n\n", " t")])
def test_a_stream_is_the_text_of_generate_in_pieces(llm: LLM, stop: tuple[str, ...]) -> None:
    params = dataclasses.replace(SAMPLED, stop=stop, max_tokens=40)
    pieces = list(llm.stream("What", params))
    assert "".join(pieces) == llm.generate("What", params)[0].text
    assert all(pieces), "no piece is empty"
    if not stop:
        assert len(pieces) == 40


def test_streams_and_generate_may_be_interleaved(llm: LLM) -> None:
    """Whoever waits computes for everybody; nobody gets another's text."""
    expected = [c.text for c in llm.generate(PROMPTS, SAMPLED)]
    first, second = llm.stream(PROMPTS[0], SAMPLED), llm.stream(PROMPTS[1], SAMPLED)
    texts = [next(first), next(second)]
    texts[0] += next(first)
    assert llm.generate(PROMPTS[2], SAMPLED)[0].text == expected[2]
    texts[1] += "".join(second)
    texts[0] += "".join(first)
    assert texts == expected[:2]


def test_threads_share_one_model(llm: LLM) -> None:
    expected = [c.text for c in llm.generate(PROMPTS, SAMPLED)]
    texts = [""] * len(PROMPTS)

    def work(i: int) -> None:
        texts[i] = "".join(llm.stream(PROMPTS[i], SAMPLED)) if i % 2 else llm.generate(PROMPTS[i], SAMPLED)[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == expected


def test_a_stream_that_is_left_ends_its_request(llm: LLM) -> None:
    pieces = llm.stream("What", SAMPLED)
    next(pieces)
    assert llm._running().has_work()
    pieces.close()  # type: ignore[attr-defined]
    assert not llm._running().has_work()
    llm.stream("What", SAMPLED)  # one that is never begun leaves nothing either


# -- when things go wrong ------------------------------------------------------------------------------------------


def raising(error: BaseException, after: int, step: Any) -> Any:
    """The runner's step, which raises once after some good ones."""
    calls = iter([None] * after + [error])

    def broken(batch: Any) -> Any:
        problem = next(calls, None)
        if problem is not None:
            raise problem
        return step(batch)

    return broken


def test_ctrl_c_ends_everything_and_the_model_can_be_used_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [c.text for c in llm.generate(PROMPTS, SAMPLED)]
    other = llm.stream("KING", SAMPLED)
    begun = next(other)
    with monkeypatch.context() as patch:
        patch.setattr(llm._runner, "step", raising(KeyboardInterrupt(), 3, llm._runner.step))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, SAMPLED)
    assert not llm._running().has_work()
    rest = "".join(other)  # it shared the step that was torn: it ends with what it has
    assert expected[4].startswith(begun + rest)
    assert [c.text for c in llm.generate(PROMPTS, SAMPLED)] == expected


def test_a_step_that_fails_is_an_error_and_not_the_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm._runner, "step", raising(RuntimeError("no memory"), 2, llm._runner.step))
        with pytest.raises(NanoGPTError, match="could not compute the request: RuntimeError: no memory"):
            llm.generate(PROMPTS, SAMPLED)
    with monkeypatch.context() as patch:
        patch.setattr(llm._runner, "step", raising(RuntimeError("no memory"), 2, llm._runner.step))
        with pytest.raises(NanoGPTError, match="no memory"):
            list(llm.stream("What", SAMPLED))
    assert len(llm.generate("What", SAMPLED)[0].token_ids) == 24


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (5, "prompts must be a text"),
        (b"bytes", "prompts must be a text"),
        ({"a": 1}, "prompts must be a text"),
        (["a", 3.5], r"Prompt 1 is 3\.5"),
        (["a", [1, "b"]], "Prompt 1 is"),
        ([True, False], "Prompt 0 is True"),
        ([[]], "no tokens"),
        ([[1], [65]], "Token 0 of the prompt is 65; this model's ids go up to 64"),
        ([[-1]], "Token 0 of the prompt is -1"),
    ],
)
def test_prompts_that_can_never_work(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts)


def test_a_character_that_the_model_lacks_is_refused_at_once(llm: LLM) -> None:
    with pytest.raises(UnknownCharacter, match=r"'é'.*position 3"):
        llm.generate(["What", "Caf\u00e9"])
    with pytest.raises(UnknownCharacter):
        llm.stream("Caf\u00e9")  # not only when the first piece is asked for


def test_params_that_can_never_work(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="There are 2 prompts but 1 params"):
        llm.generate(["a", "b"], [SAMPLED])
    with pytest.raises(InvalidRequest, match="params must be SamplingParams, not dict"):
        llm.generate(["a"], [{"max_tokens": 1}])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="logit_bias names token 65"):
        llm.generate("a", SamplingParams(logit_bias={65: 1.0}))


# -- logits, card, life --------------------------------------------------------------------------------------------


def test_logits(llm: LLM) -> None:
    logits = llm.logits([1, 2, 3])
    assert (logits.dtype, logits.shape) == (np.float32, (3, llm.config.vocab_size))
    np.testing.assert_allclose(llm.logits(np.array([1, 2])), logits[:2], atol=1e-5)
    size = llm.config.block_size
    for wrong in ([], [[1, 2]], [1] * (size + 1), [65], [-1], [1.5], "abc"):
        with pytest.raises(InvalidRequest, match="token_ids"):
            llm.logits(wrong)  # type: ignore[arg-type]


def test_the_card_says_what_was_loaded_and_what_computes(llm: LLM) -> None:
    assert llm.card["family"] == "nanogpt"
    assert (llm.card["device"], llm.card["precision"], llm.card["runner"]) == ("cpu", "fp32", "torch")
    assert "01b_nanogpt_char_tiny" in repr(llm)


def test_settings_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(SettingsError, match="device is 'gpu'; it must be one of auto, cpu, cuda"):
        LLM("/there/is/nothing", device="gpu")
    with pytest.raises(SettingsError, match="max_batch_size is 0"):
        LLM("/there/is/nothing", max_batch_size=0)


def test_a_text_follows_its_grammar_and_says_so_when_it_cannot(llm: LLM) -> None:
    """Of a model without an end-of-text token; its vocabulary is plain prose, without braces."""
    name = dataclasses.replace(SAMPLED, max_tokens=60, grammar=grammars.from_regex("[A-Z]{3,9}: [a-z ]{5}[.!]"))
    named, free = llm.generate(["\n", "\n"], [name, SAMPLED])
    assert re.fullmatch("[A-Z]{3,9}: [a-z ]{5}[.!]", named.text)
    assert named.finish_reason == "stop"
    assert free.text == llm.generate("\n", SAMPLED)[0].text
    with pytest.raises(InvalidRequest, match="no token of this model's vocabulary"):
        llm.generate("\n", SamplingParams(grammar=grammars.any_json_object()))
    with pytest.raises(InvalidRequest, match=r"by its grammar: .* goes on with the text"):
        llm.generate("\n", SamplingParams(grammar=grammars.from_regex("ab{3}[{]")))


def test_a_closed_model_says_so(shared_checkpoints: Path) -> None:
    with load(shared_checkpoints) as closing:
        pieces = closing.stream("What", SAMPLED)
        begun = next(pieces)
    assert begun + "".join(pieces) in closing_text(shared_checkpoints)
    closing.close()  # twice is once
    for use in (lambda: closing.generate("a"), lambda: closing.logits([1]), lambda: list(closing.stream("a"))):
        with pytest.raises(NanoGPTError, match="was closed"):
            use()


def closing_text(shared_checkpoints: Path) -> str:
    with load(shared_checkpoints) as model:
        return model.generate("What", SAMPLED)[0].text


# -- as the guide calls it -----------------------------------------------------------------------------------------


def test_the_guides_names(llm: LLM, shared_checkpoints: Path) -> None:
    model = load_model_from_checkpoint(shared_checkpoints / "01b_nanogpt_char_tiny", runner="torch", precision="fp32")
    assert model.eval() is model
    results = batch_generate(model, ["prompt", "prompt two", "prompt three"], max_length=12, seed=1)
    assert [text[:6] for text in results] == ["prompt"] * 3
    assert [len(text) for text in results] == [6 + 12, 10 + 12, 12 + 12], "max_length counts new tokens"
    expected = llm.generate(["prompt"], SamplingParams(max_tokens=12, seed=1))[0]
    assert results[0] == expected.full_text
    model.close()


def test_batch_generate_drops_no_word(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"no parameter 'max_len'.*max_length"):
        batch_generate(llm, ["a"], max_len=3)
    with pytest.raises(InvalidRequest, match="mean the same"):
        batch_generate(llm, ["a"], max_length=3, max_tokens=3)


def test_the_package_exports_them() -> None:
    assert {"LLM", "Completion", "SamplingParams", "batch_generate", "load_model_from_checkpoint"} <= set(
        nanogpt.__all__
    )
    assert nanogpt.LLM is LLM
    assert nanogpt.Completion is Completion
