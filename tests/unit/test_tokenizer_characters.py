"""Protects character vocabularies: what a prompt may have, and what is said when it has something else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from nanogpt.errors import TokenizerError, UnknownCharacter
from nanogpt.tokenizer import (
    characters,
    characters_from_meta,
    from_characters_json,
    load_tokenizer,
    tokenizer_from_spec,
)


def meta(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(value))
    return path


def test_the_real_meta_pkl(shared_checkpoints: Path) -> None:
    tokenizer = characters_from_meta(shared_checkpoints / "01_nanogpt_char" / "meta.pkl")
    assert (tokenizer.name, tokenizer.num_tokens, tokenizer.eos_token_id) == ("characters", 65, None)
    assert tokenizer.encode("\n !Az") == [0, 1, 2, 13, 64]


def test_an_unknown_character_is_named_with_its_place(shared_checkpoints: Path) -> None:
    """nanoGPT's own sampling ends in a KeyError here."""
    tokenizer = characters_from_meta(shared_checkpoints / "01_nanogpt_char" / "meta.pkl")
    with pytest.raises(UnknownCharacter) as caught:
        tokenizer.encode("O Romeo,\nRomeo é — 中!")
    assert caught.value.status == 400
    assert caught.value.message == (
        "The character 'é' (U+00E9) at position 15 (line 2, column 7) is not in this model's vocabulary of "
        "65 characters: '\\n' ' ' ! $ & ' , - . 3 : ; ? A-Z a-z. "
        "2 more of the text's characters are not in it: '—' (U+2014), '中' (U+4E2D)."
    )


def test_characters_that_cannot_be_seen_are_written_out() -> None:
    with pytest.raises(UnknownCharacter, match=r"'\\u200b' \(U\+200B\) at position 1 .* 2 characters: '\\t' a\."):
        characters("a\t").encode("a\u200b")


def test_a_large_vocabulary_is_summed_up() -> None:
    han = [chr(i) for i in range(0x4E00, 0x6E00, 2)]
    with pytest.raises(UnknownCharacter) as caught:
        characters([*han, *"abcxyz"]).encode("é")
    assert "vocabulary of 4102 characters: a-c x-z 一 " in caught.value.message
    assert caught.value.message.endswith(" and 4058 more.")
    assert len(caught.value.message) < 400


def test_special_tokens_are_text() -> None:
    tokenizer = characters("<|endoftx>")
    text = "<|endoftext|>"
    assert tokenizer.encode(text, allow_special=True) == tokenizer.encode(text)
    assert len(tokenizer.encode(text)) == len(text)


@pytest.mark.parametrize(
    "value",
    [
        {"stoi": {"a": 0, "中": 1}, "itos": {0: "a", 1: "中"}},
        {"stoi": {"a": 0, "中": 1}, "itos": ["a", "中"], "vocab_size": 2},
        {"itos": ["a", "中"]},
        {"itos": ("a", "中")},
        {"itos": {1: "中", 0: "a"}},
        {"stoi": {"中": 1, "a": 0}},
        {"stoi": {"中": 1, "a": 0}, "itos": None},
    ],
)
def test_the_forms_that_meta_pkl_has(value: Any, tmp_path: Path) -> None:
    tokenizer = characters_from_meta(meta(tmp_path, value))
    assert tokenizer.encode("中a") == [1, 0]
    assert tokenizer.decode([1, 0]) == "中a"
    assert tokenizer.num_tokens == 2


def test_ids_with_holes_keep_their_places(tmp_path: Path) -> None:
    tokenizer = characters_from_meta(meta(tmp_path, {"itos": {5: "b", 2: "a"}}))
    assert tokenizer.encode("ab") == [2, 5]
    assert tokenizer.num_tokens == 6
    assert tokenizer.decode([0, 2, 3, 5]) == "ab"
    again = tokenizer_from_spec(json.loads(json.dumps(tokenizer.to_spec())))
    assert (again.encode("ab"), again.num_tokens) == ([2, 5], 6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "neither stoi nor itos .found: list."),
        ({}, "neither stoi nor itos .found: nothing."),
        ({"vocab_size": 50304}, "neither stoi nor itos .found: vocab_size."),
        ({"itos": {}}, "no characters"),
        ({"itos": 7}, "itos in .* is a int"),
        ({"stoi": ["a"]}, "stoi in .* is a list"),
        ({"itos": {0: "the"}}, "id 0 is 'the', not one character"),
        ({"itos": {0: ""}}, "id 0 is '', not one character"),
        ({"itos": {0: b"a"}}, "id 0 is b'a', not one character"),
        ({"itos": {0: "x" * 10_000}}, "id 0 is 'xxx.*…, not one character"),
        ({"itos": {0: "\ud800"}}, r"half a surrogate pair as id 0 \(U\+D800\)"),
        ({"itos": {-1: "a"}}, "has the id -1; ids are 0 to"),
        ({"stoi": {"a": 2**40}}, "has the id 1099511627776; ids are 0 to"),
        ({"itos": {"0": "a"}}, "has the id '0'; ids are 0 to"),
        ({"itos": {True: "a"}}, "has the id True; ids are 0 to"),
        ({"itos": {0.5: "a"}}, "has the id 0.5; ids are 0 to"),
        ({"itos": ["a", "b", "a"]}, r"has 'a' \(U\+0061\) twice: as id 0 and 2"),
        ({"stoi": {"a": 0, "b": 0}}, "gives the id 0 to 'a' and to 'b'"),
        ({"stoi": {"a": []}}, r"has the id \[\]; ids are 0 to"),
        ({"stoi": {"a": 0, "b": 1}, "itos": {0: "b", 1: "a"}}, "id 0 is 'a' in stoi and 'b' in itos"),
        ({"stoi": {"a": 0}, "itos": {0: "a", 1: "b"}}, "id 1 is None in stoi and 'b' in itos"),
    ],
)
def test_what_is_no_character_vocabulary_says_why(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        characters_from_meta(meta(tmp_path, value))
    assert "meta.pkl" in caught.value.message


def test_characters_json(tmp_path: Path) -> None:
    path = tmp_path / "characters.json"
    path.write_text(json.dumps({"characters": ["\n", "é", None, "中"]}), encoding="utf-8")
    tokenizer = from_characters_json(path)
    assert tokenizer.encode("中é\n") == [3, 1, 0]
    assert tokenizer.num_tokens == 4
    assert load_tokenizer(tmp_path).encode("中") == load_tokenizer(path).encode("中") == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("[]", "holds a list"),
        ("{}", 'no list "characters"'),
        ('{"characters": "ab"}', 'no list "characters"'),
        ('{"characters": [1]}', "id 0 is 1, not one character"),
        ('{"characters": []}', "no characters"),
    ],
)
def test_a_damaged_characters_json_says_why(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "characters.json"
    path.write_text(text)
    with pytest.raises(TokenizerError, match=message):
        from_characters_json(path)
    path.write_bytes(b'{"characters": ["\xff"]}')
    with pytest.raises(TokenizerError, match="not UTF-8 at byte 17"):
        from_characters_json(path)
