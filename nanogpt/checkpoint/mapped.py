"""A file mapped into memory, read-only, and bounds-checked views on it.

The loader's only way to a file's bytes: nothing here copies, and no view can reach past the file's end. The map lives
for as long as an array that lies on it. A file that is cut short while it is mapped ends the process (SIGBUS): that is
why checkpoints are to be replaced by renaming, as every training script here does.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogpt.errors import CheckpointNotFound, CorruptCheckpoint


class MappedFile:
    """``data`` is the whole file. An empty file is refused: it cannot be mapped, and it is no checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise CorruptCheckpoint(f"{path} is empty.", remedy="Copy it again.")
                self.data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            raise CheckpointNotFound(f"There is no file {path}.") from None
        except OSError as error:
            raise CheckpointNotFound(f"Cannot read {path}: {error.strerror or error}.") from None

    def bytes(self, start: int, size: int) -> bytes:
        """A copy of a small piece (headers, pickles)."""
        if start < 0 or size < 0 or start + size > self.size:
            raise CorruptCheckpoint(
                f"{self.path} is damaged: it ends at byte {self.size:,}, but something lies at {start + size:,}.",
                remedy="It was probably cut short while it was copied: copy it again.",
            )
        return bytes(self.data[start : start + size])

    def array(self, dtype: str, start: int, count: int) -> npt.NDArray[Any]:
        """A flat read-only view. Where the file's layout leaves it unaligned, a copy."""
        kind = np.dtype(dtype)
        if start < 0 or count < 0 or start + count * kind.itemsize > self.size:
            raise CorruptCheckpoint(
                f"{self.path} is damaged: it ends at byte {self.size:,}, but a tensor reaches to"
                f" {start + count * kind.itemsize:,}.",
                remedy="It was probably cut short while it was copied: copy it again.",
            )
        flat = np.frombuffer(self.data, kind, count, start)
        return flat if flat.flags.aligned else flat.copy()


def release_pages(array: npt.NDArray[Any]) -> None:
    """Take a mapped file's pages under an array out of this process's memory: they were read, and may be again.

    Weights are looked at in pieces (checked, hashed, packed). Without this all of a file would be in memory in the end,
    though nobody needs more than a piece at a time. An array that lies on no mapping is left alone. One that lies on a
    mapping of no file loses what it holds.
    """
    base: object = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not array.size:
        return
    first = array.ctypes.data - np.frombuffer(base, np.uint8, 1).ctypes.data
    size = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize
    start = first - first % mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, start, min(first + size, len(base)) - start)
