"""Protects tokenizer.json: a prompt's tokens are those of its text alone; what cannot be done is refused by name."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import InvalidRequest, NanoGPTError, TokenizerError, UnknownCharacter
from nanogpt.tokenizer import Tokenizer, from_tokenizer_json, from_vocab_merges, gpt2, tokenizer_from_spec
from nanogpt.tokenizer.huggingface import HuggingFaceTokenizer, is_gpt2
from nanogpt.tokenizer.pieces import byte_symbols

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def special(token_id: int, content: str) -> dict[str, Any]:
    return {"id": token_id, "content": content, "special": True, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False}  # fmt: skip


def byte_level(**changes: Any) -> dict[str, Any]:
    """A byte-level BPE of 256 bytes, two merges and an end of text."""
    vocabulary = byte_symbols() | {"ab": 256, "abab": 257, "<eos>": 258}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["ab", "ab"]]}
    data = {"version": "1.0", "added_tokens": [special(258, "<eos>")], "normalizer": None, "pre_tokenizer": BYTE_LEVEL,
            "post_processor": None, "decoder": BYTE_LEVEL, "model": model}  # fmt: skip
    return data | changes


def words(vocabulary: list[str], decoder: Any, **changes: Any) -> dict[str, Any]:
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(vocabulary)}, "unk_token": "?"}
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": split, "post_processor": None,
            "decoder": decoder, "model": model} | changes  # fmt: skip


def build(data: dict[str, Any]) -> Tokenizer:
    data = copy.deepcopy(data)
    return HuggingFaceTokenizer(json.dumps(data), data, name="tokenizer.json", eos_token=None, source="x.json")


# -- GPT-2 recognised ------------------------------------------------------------------------------------------------


def test_gpt2s_own_file_needs_no_second_tokenizer(shared_checkpoints: Path) -> None:
    folder = shared_checkpoints / "06_hf_gpt2" / "safetensors"
    assert from_tokenizer_json(folder / "tokenizer.json") is gpt2()
    assert from_vocab_merges(folder / "vocab.json", folder / "merges.txt") is gpt2()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["pre_tokenizer"].update(add_prefix_space=True),
        lambda data: data["pre_tokenizer"].update(use_regex=False),
        lambda data: data.update(normalizer={"type": "NFC"}),
        lambda data: data["model"].update(ignore_merges=True),
        lambda data: data["model"]["merges"].pop(),
        lambda data: data["model"]["merges"].append(data["model"]["merges"].pop(0)),
        lambda data: data["added_tokens"].append(special(50257, "<|user|>")),
        lambda data: data["added_tokens"][0].update(lstrip=True),
        lambda data: data["added_tokens"].clear(),
    ],
)
def test_what_is_almost_gpt2s_is_not_taken_for_it(change: Any, shared_checkpoints: Path) -> None:
    path = shared_checkpoints / "06_hf_gpt2" / "safetensors" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    assert is_gpt2(data, "<|endoftext|>")
    assert not is_gpt2(data, "<|end|>")
    change(data)
    assert not is_gpt2(data, "<|endoftext|>")


# -- a prompt is its text --------------------------------------------------------------------------------------------


def test_special_tokens_are_text_unless_asked_for() -> None:
    tokenizer = build(byte_level())
    assert tokenizer.encode("ab<eos>") == [256, *b"<eos>"]
    assert tokenizer.encode("ab<eos>", allow_special=True) == [256, 258]
    assert tokenizer.decode([256, 258]) == "ab<eos>"
    assert tokenizer.eos_token_id == 258


def test_no_begin_or_end_is_put_around_a_prompt() -> None:
    """A BOS that a template adds would take a place of the context and change every answer."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [258], "tokens": ["<eos>"]}},
    }
    data = byte_level(post_processor=template)
    assert tokenizers.Tokenizer.from_str(json.dumps(data)).encode("ab").ids == [258, 256], "the template works"
    assert build(data).encode("ab") == build(data).encode("ab", allow_special=True) == [256]


def test_prompts_are_not_cut_filled_up_or_drawn_by_chance() -> None:
    """Settings of the training that a saved tokenizer keeps: a prompt cut to 3 tokens gives no error, only nonsense."""
    data = byte_level(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 258,
                 "pad_type_id": 0, "pad_token": "<eos>"},
    )  # fmt: skip
    data["model"]["dropout"] = 0.5
    tokenizer = build(data)
    for again in (tokenizer, tokenizer_from_spec(tokenizer.to_spec())):
        assert {tuple(again.encode("ab" * 10)) for _ in range(20)} == {(257,) * 5}


def test_a_special_token_that_a_text_would_become_is_refused() -> None:
    """A word-level vocabulary has special tokens among its words: a client could end the text by writing one."""
    whitespace = {"type": "WhitespaceSplit"}
    decoder = {"type": "Fuse"}
    data = words(["?", "hi", "[END]"], decoder, pre_tokenizer=whitespace, added_tokens=[special(2, "[END]")])
    tokenizer = build(data)
    assert tokenizer.encode("hi there") == [1, 0]
    assert tokenizer.encode("hi [END]", allow_special=True) == [1, 2]
    with pytest.raises(InvalidRequest, match=r"'\[END\]'.* special token only"):
        tokenizer.encode("hi [END]")


# -- what cannot be encoded ------------------------------------------------------------------------------------------


def test_characters_that_the_library_would_leave_out_are_named() -> None:
    """BPE without an unknown token drops what it does not know, and the answer is to another prompt."""
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    data = byte_level(model=model, added_tokens=[], pre_tokenizer=split, decoder={"type": "Fuse"})
    assert tokenizers.Tokenizer.from_str(json.dumps(data)).encode("aéb").ids == [0, 1], "the library drops it"
    with pytest.raises(UnknownCharacter, match=r"'é' \(U\+00E9\) at position 1 "):
        build(data).encode("aéb")


def test_bytes_that_the_library_would_leave_out_are_named() -> None:
    vocabulary = {symbol: i for i, symbol in enumerate("abÃ")}
    data = byte_level(model={"type": "BPE", "vocab": vocabulary, "merges": []}, added_tokens=[])
    assert build(data).encode("ab") == [0, 1]
    with pytest.raises(UnknownCharacter, match=r"'é' \(U\+00E9\) at position 2 "):
        build(data).encode("abé")


def test_a_text_that_the_library_cannot_encode_is_the_requests_fault() -> None:
    data = words(["a", "b"], None)
    with pytest.raises(InvalidRequest, match=r"cannot encode the text: .*WordLevel"):
        build(data).encode("ax")


# -- decoders --------------------------------------------------------------------------------------------------------


def test_a_character_vocabulary_without_a_decoder() -> None:
    tokenizer = build(words(["?", "a", "中", " "], None))
    assert tokenizer.encode("中 aé") == [2, 3, 1, 0]
    assert tokenizer.decode([2, 3, 1]) == "中 a"


def test_sentencepiece_like_tokens_keep_their_spaces() -> None:
    """What a model writes goes on after its prompt: a space at its beginning belongs to it."""
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    tokens = ["<unk>", "▁the", "▁", "中", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = build(words(tokens, decoder))
    assert tokenizer.decode([1, 2, 3]) == " the 中"
    assert [tokenizer.token_bytes(4 + byte) for byte in range(256)] == [bytes((byte,)) for byte in range(256)]
    assert tokenizer.decode([4 + byte for byte in "🚀".encode()]) == "🚀"

    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    assert build(words(tokens, metaspace)).decode([1, 2, 3]) == " the 中"


def test_added_tokens_are_what_they_say_not_bytes() -> None:
    """In the byte alphabet é stands for the byte E9; as an added token it is itself."""
    data = byte_level(added_tokens=[special(258, "<eos>"), special(259, "né")])
    assert build(data).token_bytes(259) == "né".encode()


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (None, "has no decoder"),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "decoder WordPiece"),
        ({"type": "BPEDecoder", "suffix": "</w>"}, "decoder BPEDecoder"),
        ({"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}, "decoder CTC"),
        ({"type": "Strip", "content": " ", "start": 1, "stop": 0}, "decoder Strip"),
        ({"type": "Replace", "pattern": {"Regex": "_+"}, "content": " "}, "decoder Replace"),
        (
            {
                "type": "Sequence",
                "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}],
            },
            "decoder Strip",
        ),
        ({"type": "Sequence", "decoders": [{"type": "Fuse"}, BYTE_LEVEL]}, "decoder ByteLevel"),
    ],
)
def test_decoders_that_cannot_be_streamed_are_refused_by_name(decoder: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        build(words(["?", "the"], decoder))


# -- the end of text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "eos"),
    [
        (None, 258),
        ({}, 258),
        ({"eos_token": None}, 258),
        ({"eos_token": "abab"}, 257),
        ({"eos_token": {"content": "ab", "lstrip": False}}, 256),
        ({"eos_token": "<not there>"}, None),
    ],
)
def test_the_end_of_text_is_told_by_the_file_beside(config: Any, eos: int | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(byte_level()))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = from_tokenizer_json(path)
    assert tokenizer.eos_token_id == eos
    assert tokenizer_from_spec(tokenizer.to_spec()).eos_token_id == eos


# -- vocab.json and merges.txt ---------------------------------------------------------------------------------------


def write_pair(tmp_path: Path, vocabulary: Any, merges: str) -> tuple[Path, Path]:
    vocab_path, merges_path = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab_path.write_text(json.dumps(vocabulary), encoding="utf-8")
    merges_path.write_bytes(merges.encode("utf-8"))
    return vocab_path, merges_path


BYTES = byte_symbols() | {"ab": 256, "Ġab": 257, "</s>": 258}


@pytest.mark.parametrize("merges", ["#version: 0.2\na b\nĠ ab\n", "a b\nĠ ab", "#version: 0.2\r\na b\r\nĠ ab\r\n"])
def test_the_older_pair_of_files(merges: str, tmp_path: Path) -> None:
    tokenizer = from_vocab_merges(*write_pair(tmp_path, BYTES, merges))
    assert tokenizer.encode("ab ab</s>中") == [256, 257, *"</s>中".encode()]
    assert tokenizer.encode("ab</s>", allow_special=True) == [256, 258]
    assert tokenizer.decode([257, 258]) == " ab</s>"
    assert (tokenizer.name, tokenizer.eos_token_id) == ("vocab.json", 258)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ([], "", "vocab.json holds a list"),
        ({}, "", "largest id is None"),
        ({"a": -1}, "", "vocab.json is damaged: the id of 'a' is -1"),
        ({"a": "0"}, "", "vocab.json is damaged: the id of 'a' is '0'"),
        ({"a": 2**31}, "", "vocab.json is damaged: the id of 'a' is 2147483648"),
        ({"a": 0, "b": 0}, "", "one id to two tokens"),
        (BYTES, "a b c", "merges.txt is damaged: line 1 is 'a b c'"),
        (BYTES, "#version: 0.2\na b\nab", "merges.txt is damaged: line 3 is 'ab'"),
        (BYTES, "Ġ a b\nab", "merges.txt is damaged: line 1 is 'Ġ a b'"),
        (BYTES, "a b\nb a", "merges.txt does not fit the vocabulary: line 2 has 'ba'"),
    ],
)
def test_a_damaged_pair_says_what_is_wrong(vocabulary: Any, merges: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        from_vocab_merges(*write_pair(tmp_path, vocabulary, merges))


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"{" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "nested too deeply|not JSON"),
        (b'"text"', "holds a str"),
        (b"../other/tokenizer.json", "a symbolic link that was copied as text"),
        (b"{}", "not a tokenizer.json that can be read"),
        (b'{"model": {"type": "BPE"}}', "not a tokenizer.json that can be read"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text)
    with pytest.raises(TokenizerError, match=message) as caught:
        from_tokenizer_json(path)
    assert str(path) in caught.value.message


def test_ids_of_added_tokens_that_the_library_would_renumber() -> None:
    with pytest.raises(TokenizerError, match="'<eos>' has the id 300, where 258 comes next"):
        build(byte_level(added_tokens=[special(300, "<eos>")]))


def test_a_panic_of_the_library_is_an_error_of_ours() -> None:
    """Rust's panics are no Exception in Python: one would go through every handler and end the thread."""
    bomb = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(InvalidRequest, match="cannot encode the text"):
        build(byte_level(pre_tokenizer=bomb)).encode("a" * 60 + "b")


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] * bool(place) + [p for key, inner in items for p in _places(inner, (*place, key))]


SMALL = words(
    ["?", "a", "▁a", "<eos>"],
    {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                                      {"type": "ByteFallback"}, {"type": "Fuse"}]},
    added_tokens=[special(3, "<eos>")],
    model={"type": "BPE", "dropout": 0.1, "unk_token": "?", "continuing_subword_prefix": "", "end_of_word_suffix": "",
           "fuse_unk": False, "byte_fallback": True, "vocab": {"?": 0, "a": 1, "▁a": 2, "<eos>": 3, "▁": 4},
           "merges": [["▁", "a"]]},
)  # fmt: skip
JUNK = [None, 0, -1, 1, 2**31, 2**64, 1e308, True, "", "x", "ByteLevel", "WordLevel", "Unigram", "(", "\x00", [], {},
        [[]], ["a", "zz"], {"type": "ByteLevel"}, {"a": 1}]  # fmt: skip


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.sampled_from(_places(SMALL)), st.sampled_from(JUNK), st.booleans()), min_size=1, max_size=3)
)
def test_whatever_is_damaged_the_error_is_ours(changes: list[tuple[tuple[Any, ...], Any, bool]]) -> None:
    data = copy.deepcopy(SMALL)
    for place, junk, remove in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # where an earlier change took the place away
            inner: Any = data
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = copy.deepcopy(junk)
            if remove:
                del inner[place[-1]]
    with contextlib.suppress(NanoGPTError):
        tokenizer = build(data)
        tokenizer.decode(tokenizer.encode("a a<eos>中"))
        tokenizer.encode("a a<eos>中", allow_special=True)
        tokenizer_from_spec(tokenizer.to_spec())
