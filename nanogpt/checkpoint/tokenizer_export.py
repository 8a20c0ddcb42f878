"""A tokenizer as the files that transformers, nanoGPT and llm.c read. Knows nothing of models."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any, Final

from nanogpt.checkpoint import pickle_writer
from nanogpt.errors import TokenizerError, UnsupportedCheckpoint
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.bpe import BytePairTokenizer
from nanogpt.tokenizer.characters import CharacterTokenizer
from nanogpt.tokenizer.files import unpack
from nanogpt.tokenizer.huggingface import HuggingFaceTokenizer
from nanogpt.tokenizer.pieces import byte_symbols

_LLMC_MAGIC: Final = 20240328
_LLMC_HEADER_BYTES: Final = 1024


def write_huggingface(tokenizer: Tokenizer, folder: Path, *, block_size: int, chat_template: str | None) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json``; for characters also ``characters.json``, which we read.

    Raises: OSError; TokenizerError for a tokenizer of an unknown kind.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, CharacterTokenizer):
        _write_json(folder / "characters.json", {"characters": list(tokenizer.characters)})
        data = _characters(tokenizer)
    elif isinstance(tokenizer, BytePairTokenizer):
        data = _byte_pairs(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        data = json.loads(unpack(tokenizer.to_spec()["file"]))
    else:
        raise TokenizerError(f"A tokenizer of the kind {tokenizer.name!r} cannot be written as tokenizer.json.")
    if tokenizer.eos_token_id is not None:
        end = tokenizer.token_bytes(tokenizer.eos_token_id).decode("utf-8")
        config.update(bos_token=end, eos_token=end, unk_token=end)
    if chat_template is not None:
        config["chat_template"] = chat_template
    _write_json(folder / "tokenizer.json", data)
    _write_json(folder / "tokenizer_config.json", config)


def write_meta(tokenizer: CharacterTokenizer, path: Path) -> None:
    """nanoGPT's ``meta.pkl``."""
    known = [(i, character) for i, character in enumerate(tokenizer.characters) if character is not None]
    meta = {
        "vocab_size": tokenizer.num_tokens,
        "itos": dict(known),
        "stoi": {character: i for i, character in known},
    }
    path.write_bytes(pickle_writer.dumps(meta))


def write_llmc(tokenizer: Tokenizer, path: Path) -> None:
    """llm.c's tokenizer file, version 2.

    Raises: UnsupportedCheckpoint where it cannot hold the tokenizer.
    """
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.num_tokens)]
    if tokenizer.eos_token_id is None or any(not 0 < len(token) < 256 for token in tokens):
        raise UnsupportedCheckpoint(
            f"llm.c's tokenizer file cannot hold the tokenizer {tokenizer.name}: it needs an end-of-text token, and"
            " tokens of 1 to 255 bytes.",
            remedy="Convert to a Hugging Face folder instead.",
        )
    header = struct.pack("<4I", _LLMC_MAGIC, 2, len(tokens), tokenizer.eos_token_id)
    body = b"".join(bytes((len(token),)) + token for token in tokens)
    path.write_bytes(header.ljust(_LLMC_HEADER_BYTES, b"\0") + body)


def _characters(tokenizer: CharacterTokenizer) -> dict[str, Any]:
    """Every character is a word. A character outside the vocabulary is an error there as it is here."""
    vocabulary = {character: i for i, character in enumerate(tokenizer.characters) if character is not None}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unknown>"}
    return _tokenizer_json(model, pre_tokenizer=split, decoder={"type": "Fuse"}, added_tokens=[])


def _byte_pairs(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    symbols = {byte: symbol for symbol, byte in byte_symbols().items()}

    def spell(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    end = tokenizer.eos_token_id
    ranks = {token: i for i, token in enumerate(tokenizer.tokens) if i != end}
    vocabulary = {spell(token): i for token, i in ranks.items()}
    merges = [list(map(spell, _parents(token, ranks))) for token in ranks if len(token) > 1]
    special = []
    if end is not None:
        text = tokenizer.tokens[end].decode("utf-8")
        vocabulary[text] = end
        special = [{"id": end, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "special": True}]  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
             "merges": merges}  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _tokenizer_json(model, pre_tokenizer=byte_level, decoder=byte_level, added_tokens=special)


def _parents(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merge into this one: what is left when all earlier merges have been done."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, i = min(pairs)
        if rank >= ranks[token]:
            raise TokenizerError(f"The token {token!r} is not made by merging two others.")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _tokenizer_json(
    model: dict[str, Any], *, pre_tokenizer: dict[str, Any], decoder: dict[str, Any], added_tokens: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
