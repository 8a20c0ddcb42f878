"""The engine with a fake runner and real tokenizers: outputs follow their grammars, and a bad grammar is its own.

The fake model draws blindly among what the mask allows, so whatever a mask allows wrongly comes up sooner or later.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeRunner, config

from nanogpt import grammars
from nanogpt.engine.core import Engine
from nanogpt.engine.grammar import Grammars
from nanogpt.engine.messages import GRAMMAR, Finished, GenerateRequest, Tokens
from nanogpt.engine.sequence import Event
from nanogpt.errors import InvalidRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.tokenizer import Tokenizer, characters, from_tokenizer_json, gpt2

JSON_CHARACTERS = characters([*'{}[]":,.-+E0123456789abcdefghijklmnopqrstuvwxyz\\ \n', None])
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "d e"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@cache
def kept_grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(lambda: tokenizer, tokenizer.num_tokens)


def make_engine(tokenizer: Tokenizer, **options: Any) -> Engine:
    runner = FakeRunner(config(block_size=400, num_tokens=tokenizer.num_tokens), 9)
    options.setdefault("grammars", kept_grammars(tokenizer))
    return Engine(runner, max_batch_size=8, max_batch_tokens=64, eos_token_id=tokenizer.eos_token_id, **options)


def write(tokenizer: Tokenizer, *params: SamplingParams, engine: Engine | None = None) -> list[tuple[str, Finished]]:
    """One text for each, all in one batch."""
    engine = engine or make_engine(tokenizer)
    events: list[list[Event]] = [[] for _ in params]
    for p, sink in zip(params, events, strict=True):
        engine.submit(GenerateRequest([0, 1, 2], p), sink.append)
    while engine.has_work():
        engine.step()
    texts = []
    for *tokens, finished in events:
        assert isinstance(finished, Finished)
        ids = [token_id for event in tokens if isinstance(event, Tokens) for token_id in event.token_ids]
        assert finished.num_output_tokens == len(ids)
        texts.append((tokenizer.decode(ids), finished))
    return texts


def asked(grammar: str | None, seed: int = 0, **params: Any) -> SamplingParams:
    return SamplingParams(grammar=grammar, seed=seed, max_tokens=params.pop("max_tokens", 300), **params)


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert re.fullmatch("[a-z]{1,8}", person["name"])
    assert type(person["age"]) is int
    assert 0 <= person["age"] <= 150
    assert set(person["tags"]) <= {"a", "bc", "d e"}
    assert len(person["tags"]) <= 3


@pytest.mark.parametrize("tokenizer", [gpt2(), JSON_CHARACTERS], ids=lambda t: t.name)
def test_a_json_schema_is_followed_to_its_end(tokenizer: Tokenizer) -> None:
    """With an end-of-text token and without one: what can only end, ends."""
    schema = grammars.from_json_schema(PERSON)
    for text, finished in write(tokenizer, *(asked(schema, seed) for seed in range(8))):
        assert (finished.reason, finished.error) == ("stop", None)
        check_person(text)


def test_a_tokenizer_json_follows_it_too(tmp_path: Any) -> None:
    """Pieces of words, byte tokens, and a special token in the middle of the vocabulary that is no text."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), '{"', '"', "name", ":", "▁", "a", "0", "1"]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [],
             "byte_fallback": True, "unk_token": "<unk>"}  # fmt: skip
    added = [
        {"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False} for i in (0, 1)
    ]  # fmt: skip
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    data = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None,
            "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = from_tokenizer_json(tmp_path / "tokenizer.json")
    assert tokenizer.eos_token_id == 1
    for text, finished in write(tokenizer, *(asked(grammars.from_json_schema(PERSON), seed) for seed in range(4))):
        assert finished.reason == "stop"
        check_person(text)


def test_any_json_object_is_json_and_does_not_drown_in_white_space() -> None:
    texts = write(JSON_CHARACTERS, *(asked(grammars.any_json_object(), seed) for seed in range(8)))
    assert any(finished.reason == "stop" for _, finished in texts)
    for text, finished in texts:
        assert text.startswith("{")
        between = re.sub(r'"(\\.|[^"\\])*("|$)', "", text)
        assert all(re.fullmatch(r" |\n {0,8}", blank) for blank in re.findall(r"\s+", between))
        if finished.reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_a_regular_expression_is_matched_from_end_to_end() -> None:
    pattern = r"[0-9]{3}-(yes|no|maybe)( [a-f]{1,6})?!"
    texts = write(gpt2(), *(asked(grammars.from_regex(pattern), seed) for seed in range(8)))
    for text, finished in texts:
        assert re.fullmatch(pattern, text)
        assert finished.reason == "stop"
    assert len({text for text, _ in texts}) > 1


def test_the_end_of_text_is_drawn_where_the_grammar_may_end_and_nowhere_else() -> None:
    """Digits without end: by the end-of-text token, by a stop token, or, where that is ignored, by max_tokens."""
    digits = grammars.from_regex("[0-9]{3,}")
    tokenizer = characters("0123456789\n")
    grammar = grammars.from_regex("[0-9]{3,}")
    for seed in range(6):
        ((text, finished),) = write(tokenizer, asked(grammar, seed, max_tokens=300, stop_token_ids=[10]))
        assert finished.reason == "stop"
        assert re.fullmatch("[0-9]{3,}", text)
        ((text, finished),) = write(tokenizer, asked(grammar, seed, max_tokens=30))
        assert (len(text), finished.reason) == (30, "length")
    mask = kept_grammars(gpt2()).start(digits, [50256]).first_mask()
    assert mask is not None
    assert not mask[50256 // 32] >> 50256 % 32 & 1
    biased = {"logit_bias": {50256: 100.0}, "temperature": 0.0}
    ((_, finished),) = write(gpt2(), asked(digits, max_tokens=30, ignore_eos=True, **biased))
    assert finished.reason == "length"


def test_a_text_that_is_complete_with_its_last_token_is_complete() -> None:
    ((text, finished),) = write(JSON_CHARACTERS, asked(grammars.from_regex("abc"), max_tokens=3))
    assert (text, finished.reason) == ("abc", "stop")
    ((text, finished),) = write(JSON_CHARACTERS, asked(grammars.from_regex("abc"), max_tokens=2))
    assert (text, finished.reason) == ("ab", "length")


def test_others_in_the_batch_are_not_masked() -> None:
    free = asked(None, 3, max_tokens=40)
    alone = write(gpt2(), free)[0][0]
    together = write(gpt2(), asked(grammars.from_regex("[0-9]{20}"), 1), free, asked(grammars.any_json_object(), 2))
    assert together[1][0] == alone
    assert re.fullmatch("[0-9]{20}", together[0][0])


def test_a_model_that_guesses_does_not_when_there_is_a_mask() -> None:
    engine = make_engine(JSON_CHARACTERS)
    engine._runner.num_guesses = 3  # type: ignore[attr-defined]
    ((text, _),) = write(JSON_CHARACTERS, asked(grammars.from_json_schema(PERSON), 4), engine=engine)
    check_person(text)


def test_a_vocabulary_that_cannot_begin_the_text_is_told_at_once() -> None:
    """A character model of plain prose has no braces."""
    with pytest.raises(InvalidRequest, match="no token of this model's vocabulary"):
        write(characters("abc"), asked(grammars.any_json_object()))
    with pytest.raises(InvalidRequest, match="no text but the empty one"):
        write(characters("abc"), asked(grammars.from_regex("a{0}")))


def test_a_dead_end_ends_its_own_request_and_says_why() -> None:
    """The text is forced into a character that the vocabulary lacks; the others in the batch go on."""
    tokenizer = characters("abc")
    dead, good = write(tokenizer, asked(grammars.from_regex("abz+")), asked(grammars.from_regex("c{9}")))
    assert (dead[0], dead[1].reason) == ("ab", "error")
    assert dead[1].error is not None
    assert dead[1].error.startswith(GRAMMAR)
    assert "no token of this model's vocabulary goes on" in dead[1].error
    assert (good[0], good[1].reason) == ("ccccccccc", "stop")
    ((text, finished),) = write(tokenizer, asked(grammars.from_regex("az(b|c)")))
    assert (text, finished.reason) == ("a", "error"), "what is forced and cannot be written is not left out"


def test_a_long_text_that_is_forced_is_written_to_its_end() -> None:
    """Longer than what is looked at at once."""
    long = "hello, world; " * 90
    ((text, finished),) = write(gpt2(), asked(grammars.from_regex(long), max_tokens=390))
    assert finished.reason in ("stop", "length")
    assert len(text) > 1100
    assert long.startswith(text)


def test_a_grammar_that_costs_too_much_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from llguidance import LLParserLimits

    monkeypatch.setattr(grammars, "limits", lambda: LLParserLimits(max_lexer_states=40, verbose_errors=False))
    engine = make_engine(JSON_CHARACTERS, grammars=Grammars(lambda: JSON_CHARACTERS, JSON_CHARACTERS.num_tokens))
    costly, good = write(
        JSON_CHARACTERS, asked(grammars.from_regex("(a|b)*a(a|b){20}c")), asked(None, max_tokens=50), engine=engine
    )
    assert costly[1].reason == "error"
    assert costly[1].error is not None
    assert "too" in costly[1].error
    assert "\n" not in costly[1].error
    assert good[1].reason == "length"


@pytest.mark.parametrize("grammar", ["no grammar", '{"grammars": []}', "\ud800", "x" * 100_000])
def test_a_grammar_that_is_none_is_refused(grammar: str) -> None:
    with pytest.raises(InvalidRequest):
        write(JSON_CHARACTERS, asked(grammar))


def test_an_engine_without_a_tokenizer_refuses() -> None:
    with pytest.raises(InvalidRequest, match="not given a tokenizer"):
        write(JSON_CHARACTERS, asked("x"), engine=make_engine(JSON_CHARACTERS, grammars=None))


def test_a_grammar_is_compiled_once_for_many_and_few_are_kept() -> None:
    kept = Grammars(lambda: JSON_CHARACTERS, JSON_CHARACTERS.num_tokens)
    engine = make_engine(JSON_CHARACTERS, grammars=kept)
    same = asked(grammars.from_regex("[a-c]{4}x"))
    texts = write(JSON_CHARACTERS, *(replace(same, seed=seed) for seed in range(8)), engine=engine)
    assert len(kept._compiled) == 1
    assert len({text for text, _ in texts}) > 1
    for i in range(40):
        kept.start(grammars.from_regex(f"a{{{i + 1}}}"), [])
    assert len(kept._compiled) == 32


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_never_asked_for_the_others() -> None:
    """Also where the tokenizer's own end of text lies outside."""
    tokens = 300
    state = Grammars(gpt2, tokens).start(grammars.from_regex("the (cat|dog)"), [50256])
    mask = state.first_mask()
    assert mask is not None
    ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert [gpt2().decode([i]) for i in ids] == ["t"]
