"""Reading tokenizer files, bounded and with our own errors, and packing one into a spec."""

from __future__ import annotations

import base64
import binascii
import json
import os
import zlib
from pathlib import Path
from typing import Any

from nanogpt.errors import TokenizerError

# The largest tokenizer.json in use (a vocabulary of 256,000 with its merges) has 35 MB.
_MAX_FILE_BYTES = 128 << 20


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole file. Raises: TokenizerError when it is not there, not readable or far too large."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"Cannot read the tokenizer {path}: {error.strerror}.") from None
    if len(data) > _MAX_FILE_BYTES:
        raise TokenizerError(f"{path} has more than {_MAX_FILE_BYTES >> 20} MiB; no tokenizer is that large.")
    return data


def read_text(path: str | os.PathLike[str]) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is damaged: not UTF-8 at byte {error.start}.") from None


def parse_object(text: str, source: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a text. Raises: TokenizerError where it is not JSON, or another kind of value."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if len(text) < 1024 and text.endswith(os.path.basename(source)) and "\n" not in text:
            reason = f"it holds {text!r}: a symbolic link that was copied as text"
        raise TokenizerError(f"{os.fspath(source)} is damaged: not JSON ({reason}).") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{os.fspath(source)} holds a {type(value).__name__}; a tokenizer is a JSON object.")
    return value


def pack(data: bytes) -> str:
    """A file's content as text for a spec: zlib, then base64."""
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


def unpack(packed: Any) -> bytes:
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode(packed, validate=True), _MAX_FILE_BYTES)
        if not decompressor.eof:  # cut short, or larger than any: a description may come with a stranger's checkpoint
            raise ValueError("it is not whole, or too large")
        return data
    except (TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise TokenizerError(f"A tokenizer's description is damaged: {error}.") from None
