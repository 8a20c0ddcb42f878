"""Token shards: files of token ids, memory-mapped, behind a header with their number and their checksum.

256 bytes of header, little-endian: magic ``NGPTTOK1``, uint32 bytes of a token (2 or 4), uint32 kind (0 text,
1 instructions), uint64 number of tokens, 32 bytes SHA-256 of the tokens; the rest is zero. Then the tokens, uint16 or
uint32. A shard of instructions carries two flags in each uint32: the first token of an example, and a token of its
answer (what the loss counts). Files are written beside their name and moved there when they are whole.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nanogpt.errors import InvalidRequest

MAGIC: Final = b"NGPTTOK1"
HEADER_BYTES: Final = 256
TEXT: Final = 0
INSTRUCTIONS: Final = 1
FIRST: Final = 1 << 30
ANSWER: Final = 1 << 31
_HEADER: Final = struct.Struct("<8sIIQ32s")
_CHUNK_BYTES: Final = 16 << 20

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """An open shard. ``tokens`` is a view on the file: uint16 or uint32."""

    path: Path
    kind: int
    sha256: str
    tokens: Tokens


def dtype_for(num_tokens: int) -> type[np.uint16] | type[np.uint32]:
    """The narrower type that holds every id of a vocabulary."""
    return np.uint16 if num_tokens <= 1 << 16 else np.uint32


def write_shard(path: Path, tokens: Tokens, *, kind: int = TEXT) -> str:
    """Writes a shard and returns its SHA-256. The name appears only when the file is whole.

    Raises: OSError.
    """
    data = np.ascontiguousarray(tokens)
    data = data.astype(data.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(data.view(np.uint8).data).digest()
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(_HEADER.pack(MAGIC, data.itemsize, kind, len(data), digest).ljust(HEADER_BYTES, b"\0"))
            file.write(data.view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return digest.hex()


def open_shard(path: Path, *, verify: bool = True) -> Shard:
    """Maps a shard; ``verify`` compares its checksum, which reads the whole file.

    Raises: InvalidRequest naming what is wrong with the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise InvalidRequest(f"Cannot read the shard {path}: {error.strerror}.", field="data") from None
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise InvalidRequest(
            f"{path} is no token shard of this program.", remedy="nanogpt prepare writes them.", field="data"
        )
    _, item, kind, count, digest = _HEADER.unpack_from(head)
    if item not in (2, 4) or kind not in (TEXT, INSTRUCTIONS) or HEADER_BYTES + count * item != size:
        raise InvalidRequest(
            f"{path} is damaged: its header announces {count:,} tokens of {item} bytes, and it has {size:,} bytes.",
            remedy="Prepare the data again.",
            field="data",
        )
    dtype = np.dtype("<u2" if item == 2 else "<u4")
    tokens: Tokens = (
        np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(count,)) if count else np.empty(0, dtype)
    )
    if verify and _sha256(path) != digest:
        raise InvalidRequest(
            f"{path} is damaged: its tokens do not have the checksum that was saved with them.",
            remedy="Copy it again, or prepare the data again.",
            field="data",
        )
    return Shard(path, kind, digest.hex(), tokens)


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()
