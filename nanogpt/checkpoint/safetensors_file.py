"""Reads and writes safetensors: an 8-byte length, a JSON header, then the tensors' bytes end to end.

Read by the format's own rules: the tensors' ranges cover the data exactly, without holes and without overlap. Tensors
are views on the file. Written without the ``safetensors`` package, so that serving does not need it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nanogpt.checkpoint.lazy import NUMPY_DTYPE, LazyTensor, Span
from nanogpt.checkpoint.mapped import MappedFile
from nanogpt.checkpoint.shown import shown
from nanogpt.checkpoint.types import DType, Tensor
from nanogpt.errors import CorruptCheckpoint, UnsupportedCheckpoint

MAX_HEADER_BYTES: Final = 4 << 20  # GPT-2 XL's header has 60 kB
MAX_DIMENSIONS: Final = 8

_FLOATS: Final[dict[str, DType]] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OTHERS: Final = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
_WRITTEN: Final = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT: Final = 64


def looks_like(file: MappedFile) -> bool:
    """A length that a header can have, and a JSON object behind it."""
    head = bytes(file.data[:9])
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") >= 2


def read(file: MappedFile) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors by name, and the header's own metadata.

    Raises: CorruptCheckpoint; UnsupportedCheckpoint for a dtype that weights of this family do not have.
    """
    size = int.from_bytes(file.bytes(0, 8), "little")
    if not 2 <= size <= min(MAX_HEADER_BYTES, file.size - 8):
        raise _damaged(file, f"its header would have {size:,} bytes")
    try:
        header = json.loads(file.bytes(8, size).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not readable ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "its metadata is not text")
    tensors: dict[str, LazyTensor] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in header.items():
        tensors[name] = tensor = _tensor(file, name, entry, 8 + size)
        ranges.append(tensor.span[1:])
    expected = 8 + size
    for start, end in sorted(ranges):
        if start != expected:
            raise _damaged(file, "its tensors overlap, or leave a hole between them")
        expected = end
    if expected != file.size:
        raise _damaged(file, f"its tensors end at byte {expected:,}, and the file at {file.size:,}")
    return tensors, metadata


def _tensor(file: MappedFile, name: str, entry: Any, base: int) -> LazyTensor:
    try:
        code, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(file, f"the header does not describe {shown(name)}") from None
    sizes = (*shape, start, end)
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
        raise _damaged(file, f"the shape or the place of {shown(name)} is not made of sizes")
    dtype = _FLOATS.get(code) if isinstance(code, str) else None
    if dtype is None and not (isinstance(code, str) and code in _OTHERS):
        raise UnsupportedCheckpoint(
            f"{file.path}: {shown(name)} has the dtype {shown(code)}; weights are F64, F32, F16 or BF16.",
            remedy="Save the model in one of these.",
        )
    item = np.dtype(NUMPY_DTYPE[dtype]).itemsize if dtype else _OTHERS[code]
    count = math.prod(shape)
    if start + count * item != end or base + end > file.size:
        raise _damaged(file, f"{shown(name)} of shape {list(shape)} does not fit the bytes {start:,} to {end:,}")

    def view(_: str) -> Tensor:
        if dtype is None:
            raise UnsupportedCheckpoint(f"{file.path}: {shown(name)} holds no weights but {code}.")
        return Tensor(dtype, file.array(NUMPY_DTYPE[dtype], base + start, count).reshape(shape))

    return LazyTensor(shape, Span(str(file.path), base + start, base + end), view, is_floating=dtype is not None)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the tensors, one at a time, in the order of their names; the data begins at a multiple of 64 bytes.

    Raises: OSError.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    # Wider elements first, so that every tensor lies at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].raw.itemsize, name))
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.num_bytes
        header[name] = {"dtype": _WRITTEN[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            file.write(contiguous_bytes(tensors[name].raw))
        file.flush()
        os.fsync(file.fileno())


def contiguous_bytes(raw: npt.NDArray[Any]) -> memoryview:
    """The elements in C order, without a copy where they lie so."""
    return np.ascontiguousarray(raw).reshape(-1).view(np.uint8).data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _damaged(file: MappedFile, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{file.path} is damaged: {why}.", remedy="Copy the file again.")
