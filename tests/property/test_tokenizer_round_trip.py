"""Protects text → ids → text for every kind of tokenizer, and the ids against those of the upstream libraries."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT, find_shared, require_service

from nanogpt.errors import UnknownCharacter
from nanogpt.tokenizer import (
    Tokenizer,
    characters_from_meta,
    from_llmc,
    from_tokenizer_json,
    from_vocab_merges,
    gpt2,
    tokenizer_from_spec,
)
from nanogpt.tokenizer.huggingface import HuggingFaceTokenizer

BPE_KINDS = ["gpt2", "llm.c", "tokenizer.json", "vocab.json", "tokenizer.json by tokenizers"]

# Words, spaces, contractions, scripts and marks: what a splitting pattern cares for. Then special tokens as text.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=12),
        st.text(" \t\n\r\u00a0\u3000\x85a1!'", max_size=12),
        st.sampled_from(
            [
                "<|endoftext|>",
                "<|endoftext|",
                "I'll",
                "we've it's 'S",
                "中文 字",
                "👩‍👩‍👧",
                "e\u0301",
                "\x00",
                "\ufeff",
                "١٢٣",
                "  \n  x",
            ]
        ),
    ),
    max_size=6,
).map("".join)


def shared_file(name: str) -> Path:
    shared = find_shared()
    require_service("../shared", shared is not None, "real tokenizer files lie there")
    assert shared is not None
    return shared / name


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    folder = "checkpoints/06_hf_gpt2/safetensors"
    if kind == "llm.c":
        return from_llmc(shared_file("checkpoints/05_llmc/gpt2_tokenizer.bin"))
    if kind == "tokenizer.json":
        return from_tokenizer_json(shared_file(f"{folder}/tokenizer.json"))
    if kind == "vocab.json":
        return from_vocab_merges(shared_file(f"{folder}/vocab.json"), shared_file(f"{folder}/merges.txt"))
    if kind == "tokenizer.json by tokenizers":
        text = shared_file(f"{folder}/tokenizer.json").read_text(encoding="utf-8")
        return HuggingFaceTokenizer(text, json.loads(text), name="tokenizer.json", eos_token=None, source="x")
    return gpt2()


@functools.cache
def upstream() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(shared_file("checkpoints/06_hf_gpt2/safetensors/tokenizer.json")))


@pytest.mark.parametrize("kind", BPE_KINDS)
@given(text=TEXTS)
def test_text_comes_back_whole(kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text)
    assert tokenizer(kind).decode(ids) == text
    assert b"".join(map(tokenizer(kind).token_bytes, ids)) == text.encode()
    assert 50256 not in ids, "a special token in a text is text"


@pytest.mark.parametrize("kind", BPE_KINDS)
@given(text=TEXTS)
def test_special_tokens_are_special_when_asked_for(kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text, allow_special=True)
    assert tokenizer(kind).decode(ids) == text
    assert ids.count(50256) == text.count("<|endoftext|>")
    assert ids == upstream().encode(text, add_special_tokens=False).ids


@given(text=TEXTS)
def test_every_gpt2_gives_the_same_ids(text: str) -> None:
    ids = gpt2().encode(text)
    for kind in BPE_KINDS:
        assert tokenizer(kind).encode(text) == ids


@pytest.mark.parametrize("kind", [*BPE_KINDS])
@given(ids=st.lists(st.integers(0, 50256), max_size=40))
def test_decode_is_the_bytes_of_the_ids_laid_end_to_end(kind: str, ids: list[int]) -> None:
    assert tokenizer(kind).decode(ids) == upstream().decode(ids, skip_special_tokens=False)


@given(st.data())
def test_characters_come_back_whole_or_are_named(data: st.DataObject) -> None:
    known = characters_from_meta(shared_file("checkpoints/01_nanogpt_char/meta.pkl"))
    text = data.draw(st.text("".join(filter(None, known.characters)), max_size=60))
    ids = known.encode(text)
    assert len(ids) == len(text)
    assert known.decode(ids) == text

    strange = data.draw(st.characters(codec="utf-8").filter(lambda c: c not in known.characters))
    with pytest.raises(UnknownCharacter) as caught:
        known.encode(text + strange + "\x07")
    assert f"{strange!r} (U+{ord(strange):04X}) at position {len(text)} " in caught.value.message


@settings(max_examples=20)
@given(text=TEXTS)
@pytest.mark.parametrize("kind", BPE_KINDS)
def test_a_spec_rebuilds_the_same_tokenizer(kind: str, text: str) -> None:
    again = rebuilt(kind)
    for allow_special in (False, True):
        ids = tokenizer(kind).encode(text, allow_special=allow_special)
        assert again.encode(text, allow_special=allow_special) == ids
    assert again.decode(ids) == text


@functools.cache
def rebuilt(kind: str) -> Tokenizer:
    """By way of the socket's format and of JSON."""
    original = tokenizer(kind)
    spec = json.loads(json.dumps(msgpack.unpackb(msgpack.packb(original.to_spec()))))
    again = tokenizer_from_spec(spec)
    assert (again.name, again.num_tokens, again.eos_token_id) == (
        original.name,
        original.num_tokens,
        original.eos_token_id,
    )
    assert again.to_spec() == spec
    return again


# tiktoken's own gpt2 reads its files from a folder as it would from the network; a process of its own keeps that
# folder's variable, and the download it stands for, out of the other tests.
TIKTOKEN = """
import json, sys, tiktoken
encoding = tiktoken.get_encoding("gpt2")
for line in sys.stdin:
    text = json.loads(line)
    print(json.dumps([encoding.encode_ordinary(text), encoding.encode(text, allowed_special="all")]), flush=True)
"""


def test_ids_are_those_of_tiktokens_own_gpt2() -> None:
    cache = shared_file("data/gpt2-bpe/tiktoken-cache")
    process = subprocess.Popen(
        [sys.executable, "-c", TIKTOKEN],
        env={"TIKTOKEN_CACHE_DIR": str(cache), "PATH": ""},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    @given(TEXTS)
    @settings(max_examples=300)
    def check(text: str) -> None:
        stdin.write(json.dumps(text) + "\n")
        stdin.flush()
        ordinary, special = json.loads(stdout.readline())
        assert gpt2().encode(text) == ordinary
        assert gpt2().encode(text, allow_special=True) == special

    with process:
        try:
            check()
        finally:
            stdin.close()
            process.wait(timeout=10)
