"""Byte pair encoding by tiktoken: GPT-2's, from the ranks in this package, and those of llm.c's tokenizer files.

Nothing here can reach a network: tiktoken is given the ranks and never asked for one of its own encodings.
The packaged ranks lie in llm.c's format, which is the most compact plain one and is read in a few milliseconds.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogpt.errors import TokenizerError
from nanogpt.tokenizer.base import check_text, decode_bytes
from nanogpt.tokenizer.files import pack, read_bytes, unpack

LLMC_MAGIC = 20240328
_HEADER_BYTES = 1024
_GPT2_NUM_TOKENS = 50257
_GPT2_EOS = 50256
_GPT2_FILE = Path(__file__).resolve().parent.parent / "assets" / "gpt2" / "tokenizer.bin"

# How GPT-2 splits a text into words before it merges. Possessive, as in tiktoken: equivalent to the published pattern
# 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ but it never backtracks.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class BytePairTokenizer:
    """GPT-2's splitting with any ranks in merge order. ``tokens`` are the bytes of every id, the end of text too."""

    def __init__(self, name: str, tokens: list[bytes], eos_token_id: int, *, source: str) -> None:
        # Late: tiktoken takes some 20 ms, which a command that only prints its help does not have.
        from tiktoken import Encoding

        ranks = dict(zip(tokens, range(len(tokens)), strict=True))
        _check(tokens, ranks, eos_token_id, source)
        end_of_text = tokens[eos_token_id]
        del ranks[end_of_text]
        self.name = name
        self.num_tokens = len(tokens)
        self.eos_token_id: int | None = eos_token_id  # as the protocol types it; never None here
        self.tokens = tokens
        self._encoding = Encoding(
            name, pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={end_of_text.decode(): eos_token_id}
        )
        # The encoding has copied the ranks into tables of its own and keeps the dict only to be pickled: 5 MB.
        ranks.clear()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        check_text(text)
        if allow_special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if 0 <= token_id < self.num_tokens else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode_bytes(self.token_bytes, token_ids)

    def to_spec(self) -> dict[str, Any]:
        if self.name == "gpt2":
            return {"kind": "gpt2"}
        return {"kind": "llm.c", "file": pack(write_llmc(self))}


@functools.lru_cache(maxsize=1)
def gpt2() -> BytePairTokenizer:
    """GPT-2's tokenizer, always the same object: 24 MB are enough once."""
    tokens, eos_token_id = _read_llmc(read_bytes(_GPT2_FILE), str(_GPT2_FILE))
    return BytePairTokenizer("gpt2", tokens, eos_token_id, source=str(_GPT2_FILE))


def from_llmc(path: str | os.PathLike[str]) -> BytePairTokenizer:
    """The tokenizer of a file that llm.c wrote (``gpt2_tokenizer.bin``), version 1 or 2.

    A file that holds GPT-2's tokenizer, as those of llm.c's own scripts do, gives ``gpt2()``.
    Such a file does not say how a text is split into words: as in llm.c itself, that is GPT-2's way.

    Raises: TokenizerError naming what is wrong with the file.
    """
    return _from_llmc_bytes(read_bytes(path), os.fspath(path))


def from_llmc_spec(spec: Mapping[str, Any]) -> BytePairTokenizer:
    return _from_llmc_bytes(unpack(spec.get("file")), "the tokenizer's description")


def write_llmc(tokenizer: BytePairTokenizer) -> bytes:
    """The tokenizer as llm.c's tokenizer file, version 2. The packaged ranks were written by it."""
    header = struct.pack("<4I", LLMC_MAGIC, 2, tokenizer.num_tokens, tokenizer.eos_token_id)
    return header.ljust(_HEADER_BYTES, b"\0") + b"".join(bytes((len(token),)) + token for token in tokenizer.tokens)


def _from_llmc_bytes(data: bytes, source: str) -> BytePairTokenizer:
    tokens, eos_token_id = _read_llmc(data, source)
    if eos_token_id == _GPT2_EOS and data[_HEADER_BYTES:] == read_bytes(_GPT2_FILE)[_HEADER_BYTES:]:
        return gpt2()
    return BytePairTokenizer("llm.c", tokens, eos_token_id, source=source)


def _check(tokens: list[bytes], ranks: dict[bytes, int], eos_token_id: int, source: str) -> None:
    """Refuse what tiktoken would panic on, at once or in the middle of somebody's prompt."""
    if len(ranks) < len(tokens):
        again = next(i for i, token in enumerate(tokens) if ranks[token] != i)
        raise TokenizerError(f"{source} is damaged: tokens {again} and {ranks[tokens[again]]} are the same.")
    if b"" in ranks:
        raise TokenizerError(f"{source} is damaged: token {ranks[b'']} is empty.")
    if eos_token_id >= len(tokens):
        raise TokenizerError(f"{source} is damaged: its end of text is id {eos_token_id} of {len(tokens)}.")
    try:
        tokens[eos_token_id].decode("utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{source} is damaged: its end of text (id {eos_token_id}) is not UTF-8.") from None
    missing = [byte for byte in range(256) if ranks.get(bytes((byte,)), eos_token_id) == eos_token_id]
    if missing:
        raise TokenizerError(
            f"{source} has no token for the byte {missing[0]} ({len(missing)} of the 256 are missing).",
            remedy="Every byte needs a token of its own, or some texts cannot be encoded.",
        )


def _read_llmc(data: bytes, source: str) -> tuple[list[bytes], int]:
    """The bytes of every token in id order, and the end of text.

    256 uint32: magic, version, number of tokens, end of text (from version 2 on); then, for each token, its length
    in one byte and its bytes.
    """
    if len(data) < _HEADER_BYTES:
        raise TokenizerError(f"{source} is damaged: {len(data)} bytes, less than the header of llm.c's tokenizer file.")
    magic, version, num_tokens, eos_token_id = struct.unpack_from("<4I", data)
    if magic != LLMC_MAGIC:
        raise TokenizerError(f"{source} is not llm.c's tokenizer file: magic {magic}, not {LLMC_MAGIC}.")
    if version == 1 and num_tokens == _GPT2_NUM_TOKENS:
        eos_token_id = _GPT2_EOS
    elif version != 2:
        raise TokenizerError(
            f"{source} is llm.c's tokenizer file of version {version} with {num_tokens} tokens.",
            remedy=f"Versions 1 (GPT-2's {_GPT2_NUM_TOKENS} tokens) and 2 are known.",
        )
    # Every token takes a byte at least: a false count ends here, not in a loop of four thousand million.
    if num_tokens > len(data) - _HEADER_BYTES:
        raise TokenizerError(f"{source} is damaged: it announces {num_tokens} tokens but ends after {len(data)} bytes.")
    tokens: list[bytes] = []
    start = _HEADER_BYTES
    while len(tokens) < num_tokens and start < len(data):
        end = start + 1 + data[start]
        tokens.append(data[start + 1 : end])
        start = end
    if len(tokens) < num_tokens or start > len(data):
        raise TokenizerError(f"{source} is damaged: it ends within token {len(tokens)} of {num_tokens}.")
    if start < len(data):
        raise TokenizerError(f"{source} is damaged: {len(data) - start} bytes follow its last token.")
    return tokens, eos_token_id
