"""Protects how a tokenizer is found, what it refuses, and that threads can share it."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from nanogpt.errors import InvalidRequest, NanoGPTError, TokenizerError, UnsafeCheckpoint
from nanogpt.tokenizer import (
    Tokenizer,
    characters,
    from_llmc,
    gpt2,
    load_tokenizer,
    tokenizer_from_spec,
)
from nanogpt.tokenizer.bpe import write_llmc
from nanogpt.tokenizer.huggingface import HuggingFaceTokenizer

GPT2_BIN = ROOT / "nanogpt" / "assets" / "gpt2" / "tokenizer.bin"


# -- GPT-2's, from the package -------------------------------------------------------------------------------------


def test_gpt2_needs_no_network_and_no_home(tmp_path: Path) -> None:
    """tiktoken downloads its ranks at the first use and fails in an air-gapped place; ours never opens a socket."""
    code = """
import sys
def refuse(event, args):
    if event.startswith("socket.") or event == "open" and str(args[0]).startswith(sys.argv[1]):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(refuse)
from nanogpt.tokenizer import gpt2
assert gpt2().encode("Hello world") == [15496, 995]
assert "requests" not in sys.modules
"""
    environment = {"HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path), "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr


def test_the_packaged_ranks_are_openais(shared: Path) -> None:
    """Each id's bytes against encoder.json, and the order of ids against that of the published merges."""
    encoder = json.loads((shared / "data/gpt2-bpe/encoder.json").read_text(encoding="utf-8"))
    merges = (shared / "data/gpt2-bpe/vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*printable, *(byte for byte in range(256) if byte not in printable)]
    symbol_of = {byte: chr(byte if i < len(printable) else 256 + i - len(printable)) for i, byte in enumerate(symbols)}
    for token_id in range(50256):
        token = "".join(symbol_of[byte] for byte in gpt2().token_bytes(token_id))
        assert encoder[token] == token_id
    assert [encoder[merge.replace(" ", "")] for merge in merges] == list(range(256, 50256))
    assert encoder["<|endoftext|>"] == gpt2().eos_token_id == 50256
    assert gpt2().token_bytes(50256) == b"<|endoftext|>"
    assert gpt2().num_tokens == 50257


def test_openais_licence_lies_beside_the_ranks() -> None:
    text = (GPT2_BIN.parent / "LICENSE").read_text(encoding="utf-8")
    assert "Copyright (c) 2019 OpenAI" in text
    assert "Permission is hereby granted" in text


def test_importing_the_tokenizers_loads_no_library() -> None:
    code = "import sys, nanogpt.tokenizer; print([m for m in ('tiktoken', 'tokenizers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


# -- any text ------------------------------------------------------------------------------------------------------

TINY_JSON: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "aa": 1, "aaaa": 2, "Ġ": 3}, "merges": [["a", "a"], ["aa", "aa"]]},
}


def tiny() -> Tokenizer:
    return HuggingFaceTokenizer(json.dumps(TINY_JSON), dict(TINY_JSON), name="tiny", eos_token=None, source="tiny.json")


@pytest.mark.parametrize("tokenizer", [gpt2(), characters("a "), tiny()], ids=lambda t: t.name)
def test_no_text_is_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == tokenizer.encode("", allow_special=True) == []
    assert tokenizer.decode([]) == ""
    assert isinstance(tokenizer, Tokenizer)


@pytest.mark.parametrize("tokenizer", [gpt2(), characters("a "), tiny()], ids=lambda t: t.name)
@pytest.mark.parametrize("allow_special", [False, True])
def test_half_a_surrogate_pair_is_refused_by_name(tokenizer: Tokenizer, allow_special: bool) -> None:
    """JSON can carry one; Rust's libraries raise a TypeError on it, or replace it silently."""
    with pytest.raises(InvalidRequest, match=r"U\+D800\) at position 2 \(line 2, column 1\)"):
        tokenizer.encode("a\n\ud800a", allow_special=allow_special)


@pytest.mark.parametrize("tokenizer", [gpt2(), characters("a "), tiny()], ids=lambda t: t.name)
@pytest.mark.parametrize("token_id", [-1, 50257, 2**40])
def test_unknown_ids_stand_for_nothing(tokenizer: Tokenizer, token_id: int) -> None:
    """Rows that pad a vocabulary (50304 for 50257) have ids that no tokenizer knows; -1 must not be the last token."""
    assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([token_id, 0]) == tokenizer.decode([0])


@pytest.mark.parametrize("text", ["a", " ", "\n", "ab", "!", "7", "中", "\u0301", " a"])
def test_a_million_characters_of_one_kind_take_no_quadratic_time(text: str) -> None:
    """One run of letters is one word to the merging: tiktoken before 0.13 takes an hour for it."""
    text = text * (1_000_000 // len(text))
    ids = gpt2().encode(text)
    assert gpt2().decode(ids) == text


def test_long_runs_have_the_ids_of_short_ones() -> None:
    assert gpt2().encode("a" * 1_000_000) == gpt2().encode("aaaa") * 250_000
    assert tiny().encode("a" * 1_000_000) == [2] * 250_000


@pytest.mark.parametrize(
    "make", [lambda: gpt2(), tiny, lambda: characters("a <|>endoftxh")], ids=["bpe", "json", "chars"]
)
def test_threads_share_a_tokenizer(make: Any) -> None:
    """A worker has one tokenizer for all its threads; a switch for special tokens on it would leak between them."""
    if make is tiny:
        data = json.loads(json.dumps(TINY_JSON))
        data["added_tokens"] = [{"id": 4, "content": "<e>", "special": True, "single_word": False, "lstrip": False,
                                 "rstrip": False, "normalized": False}]  # fmt: skip
        data["model"]["vocab"] |= {"<e>": 4, "<": 5, "e": 6, ">": 7}
        tokenizer: Tokenizer = HuggingFaceTokenizer(json.dumps(data), data, name="x", eos_token=None, source="x")
        texts = ["a" * n + "<e>" for n in range(1, 60)]
    else:
        tokenizer = make()
        texts = ["a" * n + "<|endoftext|>" for n in range(1, 60)]
    expected = {
        (text, special): tokenizer.encode(text, allow_special=special) for text in texts for special in (False, True)
    }
    wrong: list[object] = []
    start = threading.Barrier(8)

    def hammer(number: int) -> None:
        start.wait()
        for turn in range(5):
            for text in texts[:: 1 if number % 2 else -1]:
                special = (number + turn) % 2 == 0
                try:
                    ids = tokenizer.encode(text, allow_special=special)
                    if ids != expected[text, special] or tokenizer.decode(ids) != text:
                        wrong.append((text, special, ids))
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- llm.c's file --------------------------------------------------------------------------------------------------


def llmc_file(tokens: list[bytes], *, magic: int = 20240328, version: int = 2, eos: int = 0, count: int = -1) -> bytes:
    header = struct.pack("<4I", magic, version, len(tokens) if count < 0 else count, eos).ljust(1024, b"\0")
    return header + b"".join(bytes((len(token),)) + token for token in tokens)


SMALL = [bytes((byte,)) for byte in range(256)] + [b"ab", b"abab", b"<|eot|>"]


def test_llmcs_own_file_is_gpt2(shared_checkpoints: Path, tmp_path: Path) -> None:
    path = shared_checkpoints / "05_llmc" / "gpt2_tokenizer.bin"
    assert from_llmc(path) is gpt2()
    assert path.read_bytes() == write_llmc(gpt2())
    old = tmp_path / "gpt2_tokenizer.bin"
    old.write_bytes(struct.pack("<4I", 20240328, 1, 50257, 0).ljust(1024, b"\0") + path.read_bytes()[1024:])
    assert from_llmc(old) is gpt2(), "version 1 did not say the end of text; it was GPT-2's"


def test_an_llmc_file_of_another_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(llmc_file(SMALL, eos=258))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.name, tokenizer.num_tokens, tokenizer.eos_token_id) == ("llm.c", 259, 258)
    assert tokenizer.encode("ababab c") == [257, 256, ord(" "), ord("c")]
    assert tokenizer.encode("ab<|eot|>", allow_special=True) == [256, 258]
    assert tokenizer.decode(tokenizer.encode("ab<|eot|>中")) == "ab<|eot|>中"
    again = tokenizer_from_spec(json.loads(json.dumps(tokenizer.to_spec())))
    assert again.encode("ababab<|eot|>", allow_special=True) == [257, 256, 258]
    assert (again.name, again.num_tokens, again.eos_token_id) == ("llm.c", 259, 258)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, less than the header"),
        (llmc_file(SMALL)[:500], "less than the header"),
        (llmc_file(SMALL, magic=20240326), "not llm.c's tokenizer file: magic 20240326"),
        (llmc_file(SMALL, version=3), "version 3"),
        (llmc_file(SMALL, version=1), "version 1 with 259 tokens"),
        (llmc_file(SMALL, count=2**32 - 1), "announces 4294967295 tokens"),
        (llmc_file(SMALL, count=260), "ends within token 259 of 260"),
        (llmc_file(SMALL)[:-1], "ends within token"),
        (llmc_file(SMALL, count=258), "8 bytes follow its last token"),
        (llmc_file(SMALL, eos=259), "end of text is id 259 of 259"),
        (llmc_file(SMALL, eos=200), "end of text .id 200. is not UTF-8"),
        (llmc_file([*SMALL, b""], eos=258), "token 259 is empty"),
        (llmc_file([*SMALL, b"ab"], eos=258), "tokens 256 and 259 are the same"),
        (llmc_file(SMALL[1:], eos=257), "no token for the byte 0 "),
        (llmc_file([], eos=0), "end of text is id 0 of 0"),
    ],
)
def test_a_damaged_llmc_file_says_what_is_wrong(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=message) as caught:
        from_llmc(path)
    assert str(path) in str(caught.value)


def test_every_truncation_of_an_llmc_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    whole = llmc_file(SMALL, eos=258)
    for size in range(1000, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(TokenizerError):
            from_llmc(path)


# -- which tokenizer is meant ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("01_nanogpt_char/meta.pkl", "characters"),
        ("01_nanogpt_char", "characters"),
        ("05_llmc/gpt2_tokenizer.bin", "gpt2"),
        ("05_llmc", "gpt2"),
        ("06_hf_gpt2/safetensors/tokenizer.json", "gpt2"),
        ("06_hf_gpt2/safetensors/vocab.json", "gpt2"),
        ("06_hf_gpt2/safetensors/merges.txt", "gpt2"),
        ("06_hf_gpt2/safetensors", "gpt2"),
    ],
)
def test_real_files_and_folders_are_recognised(path: str, name: str, shared_checkpoints: Path) -> None:
    assert load_tokenizer(str(shared_checkpoints / path)).name == name


def test_gpt2_is_known_by_name_alone() -> None:
    assert load_tokenizer("gpt2") is gpt2()


@pytest.mark.parametrize("name", ["gpt3", "cl100k_base", "openai-community/gpt2", "", "/nowhere/tokenizer.json"])
def test_an_unknown_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(name)
    assert "gpt2, or a path" in (caught.value.remedy or "")


def test_a_folder_with_two_tokenizers_is_not_guessed_at(shared_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copy(shared_checkpoints / "01_nanogpt_char/meta.pkl", tmp_path)
    shutil.copy(shared_checkpoints / "05_llmc/gpt2_tokenizer.bin", tmp_path)
    with pytest.raises(TokenizerError, match=r"has meta\.pkl and gpt2_tokenizer\.bin: which"):
        load_tokenizer(tmp_path)


def test_files_that_are_no_tokenizers_are_refused(shared_checkpoints: Path, tmp_path: Path) -> None:
    lone_vocabulary = tmp_path / "vocab.json"
    lone_vocabulary.write_text('{"a": 0}')
    nanochat = tmp_path / "tokenizer.pkl"
    nanochat.write_bytes(b"\x80\x04.")
    for path, message in (
        (shared_checkpoints / "01_nanogpt_char/ckpt.pt", "is not a tokenizer that is known"),
        (shared_checkpoints / "05_llmc/gpt2_d2.bin", "is not a tokenizer that is known"),
        (shared_checkpoints / "06_hf_gpt2/safetensors/config.json", "is not a tokenizer that is known"),
        (lone_vocabulary, "needs the merges.txt"),
        (nanochat, "nanochat's pickled tokenizer"),
    ):
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(path)
    with pytest.raises(TokenizerError, match="No tokenizer lies in"):
        load_tokenizer(shared_checkpoints)


def test_a_pickle_that_wants_to_run_something_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    proof = tmp_path / "proof"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR.")
    with pytest.raises(UnsafeCheckpoint, match="system"):
        load_tokenizer(path)
    assert not proof.exists()


# -- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"kind": "bert"},
        {"kind": "characters"},
        {"kind": "characters", "characters": ["ab"]},
        {"kind": "llm.c"},
        {"kind": "llm.c", "file": "?"},
        {"kind": "llm.c", "file": "AAAA"},
        {"kind": "huggingface", "name": "x", "file": None},
    ],
)
def test_a_spec_that_is_none_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError):
        tokenizer_from_spec(spec)


def test_gpt2s_spec_is_its_name() -> None:
    """The ranks are in every process's own package: half a megabyte that no hello message carries."""
    assert gpt2().to_spec() == {"kind": "gpt2"}
    assert tokenizer_from_spec({"kind": "gpt2"}) is gpt2()


def test_errors_are_the_products_own(tmp_path: Path) -> None:
    for path in (tmp_path / "meta.pkl", tmp_path / "tokenizer.json", tmp_path / "tokenizer.bin"):
        path.write_bytes(hashlib.sha256(path.name.encode()).digest())
        with pytest.raises(NanoGPTError, match=path.name):
            load_tokenizer(path)
