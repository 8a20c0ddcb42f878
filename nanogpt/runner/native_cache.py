"""Packed weights on disk: written once a checkpoint, memory-mapped by every start after that. Owned by the engine.

The folder is NANOGPT_CACHE_DIR, else nanogpt/ in the user's cache folder; ``off`` keeps nothing. A file's name holds
the SHA-256 of the weights, so that it serves a checkpoint wherever that is moved, and its header says what it must be:
the layout is computed from the model's configuration and never read from the file. So a damaged or foreign file is at
worst not used. Files appear under their names complete (written aside, then renamed), and are never changed afterwards.

A cache may fail for any reason: it is full, read-only, somebody else's. Then weights are packed in memory, as without.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanogpt import _kernels
from nanogpt.checkpoint.digest import cache_folder, weights_digest
from nanogpt.checkpoint.mapped import release_pages
from nanogpt.checkpoint.types import Checkpoint

Bytes = npt.NDArray[np.uint8]

logger = logging.getLogger("nanogpt.runner")

FORMAT = 2
"""Counted up whenever the bytes of a packed model mean something else."""
MAX_BYTES = 8 << 30
"""Of all files together; the least recently used go first."""

_MAGIC = b"nanogpt packed\r\n"
_HEADER = struct.Struct("<16sII32s32sQQ")  # magic, format, header's bytes, what it is, weights, size, checksum
_HEADER_BYTES = 128  # the data begins on a cache line
_ABANDONED_S = 3600.0
_PIECE_BYTES = 32 << 20  # whole pages: they are given back


def packed_weights(checkpoint: Checkpoint, description: str, size: int, pack: Callable[[Bytes], None]) -> Bytes:
    """The packed buffer of a checkpoint, mapped from the cache or made by ``pack`` (and then kept).

    ``description`` tells everything that the buffer's meaning depends on besides the weights.
    """
    folder = cache_folder()
    if folder is None:
        return packed_in_memory(size, pack)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = weights_digest(checkpoint)
    except OSError as error:
        logger.info("Packed weights are not kept: %s.", error)
        return packed_in_memory(size, pack)
    what = hashlib.sha256(f"{FORMAT} {description}".encode()).digest()
    path = folder / f"{digest[:32]}-{what.hex()[:16]}.packed"
    found = read_packed(path, what, bytes.fromhex(digest), size)
    if found is not None:
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: the last to be removed
        return found
    try:
        _write(path, what, bytes.fromhex(digest), size, pack)
        _remove_old(folder, keep=path)
    except OSError as error:
        logger.info("Packed weights are not kept: %s.", error)
        return packed_in_memory(size, pack)
    mapped = read_packed(path, what, bytes.fromhex(digest), size)
    return packed_in_memory(size, pack) if mapped is None else mapped


def read_packed(path: Path, what: bytes, weights: bytes, size: int) -> Bytes | None:
    """The data of a packed file, memory-mapped read-only; None unless it is whole and just what is looked for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        # A file of another user could change under the mapping.
        if status.st_uid != os.geteuid() or status.st_size != _HEADER_BYTES + size:
            return None
        header = file.read(_HEADER_BYTES)
        magic, version, header_bytes, is_what, is_weights, is_size, checksum = _HEADER.unpack_from(header)
        if (magic, version, header_bytes, is_size) != (_MAGIC, FORMAT, _HEADER_BYTES, size):
            return None
        if (is_what, is_weights) != (what, weights):
            return None
        data: Bytes = np.memmap(file, np.uint8, mode="r", offset=0)[_HEADER_BYTES:].view(np.ndarray)
    return data if _kernels.checksum(data) == checksum else None


def packed_in_memory(size: int, pack: Callable[[Bytes], None]) -> Bytes:
    """A buffer that ``pack`` filled, kept nowhere."""
    # Aligned to a cache line, which np.empty does not promise.
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    pack(memory[start : start + size])
    return memory[start : start + size]


def _write(path: Path, what: bytes, weights: bytes, size: int, pack: Callable[[Bytes], None]) -> None:
    """Pack in memory, then write in large pieces, each of which is given back: so the weights are in memory once.

    Some file systems (ext4 since Linux 6.16) keep what one call wrote in pages as large. Mapped, such a file takes few
    entries of the processor's page tables, and a step reads all of it.
    """
    memory = mmap.mmap(-1, _HEADER_BYTES + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    image: Bytes = np.frombuffer(memory, np.uint8)
    packed = image[_HEADER_BYTES:]
    pack(packed)
    header = _HEADER.pack(_MAGIC, FORMAT, _HEADER_BYTES, what, weights, size, _kernels.checksum(packed))
    image[: len(header)] = np.frombuffer(header, np.uint8)
    descriptor, name = tempfile.mkstemp(suffix=".new", dir=path.parent)  # readable by its user only
    try:
        with open(descriptor, "wb", buffering=0) as file:
            for start in range(0, len(image), _PIECE_BYTES):
                left = image.data[start : start + _PIECE_BYTES]
                while left:
                    left = left[file.write(left) :]
                release_pages(image[start : start + _PIECE_BYTES])
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _remove_old(folder: Path, keep: Path) -> None:
    """Keep the folder under its size, and clear away what a killed writer left."""
    files = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            status = entry.stat()
            if entry.suffix == ".packed" and entry != keep:
                files.append((status.st_mtime, status.st_size, entry))
            elif entry.suffix == ".new" and time.time() - status.st_mtime > _ABANDONED_S:
                entry.unlink()
    room = MAX_BYTES - keep.stat().st_size
    for _, size, entry in sorted(files, reverse=True):
        room -= size
        if room < 0:
            with contextlib.suppress(OSError):
                entry.unlink()
