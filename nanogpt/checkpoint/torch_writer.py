"""Writes what ``torch.save`` writes: a zip of ``data.pkl`` and storages, stored and aligned. Needs no PyTorch."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nanogpt.checkpoint import pickle_writer
from nanogpt.checkpoint.pickle_writer import Call, Global, Persistent
from nanogpt.checkpoint.safetensors_file import contiguous_bytes
from nanogpt.checkpoint.types import DType, Tensor

_STORAGES: Final[dict[DType, str]] = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}
_ALIGNMENT: Final = 64
_LOCAL_HEADER_BYTES: Final = 30


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a dictionary of plain data and ``Tensor``. The same ``Tensor`` twice is stored once, as tied weights are.

    Raises: OSError.
    """
    storages: dict[int, tuple[str, Tensor]] = {}
    pickled = pickle_writer.dumps(_pickled(value, storages))
    folder = path.stem
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, f"{folder}/data.pkl", memoryview(pickled))
            _add(archive, f"{folder}/byteorder", memoryview(b"little"))
            for key, tensor in storages.values():
                _add(archive, f"{folder}/data/{key}", contiguous_bytes(tensor.raw))
            _add(archive, f"{folder}/version", memoryview(b"3\n"))
        file.flush()
        os.fsync(file.fileno())


def _pickled(value: Any, storages: dict[int, tuple[str, Tensor]]) -> Any:
    """The value with tensors replaced by what makes them on loading."""
    if isinstance(value, Mapping):
        return {key: _pickled(item, storages) for key, item in value.items()}
    if isinstance(value, list):
        return [_pickled(item, storages) for item in value]
    if not isinstance(value, Tensor):
        return value
    key, _ = storages.setdefault(id(value), (str(len(storages)), value))
    storage = Persistent(("storage", Global("torch", _STORAGES[value.dtype]), key, "cpu", value.raw.size))
    strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, value.shape, strides, False, hooks))


def _add(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """Adds a member whose data begins at a multiple of 64 bytes, so that it can be mapped into memory."""
    assert archive.fp is not None
    info = zipfile.ZipInfo(name)  # its fixed date makes the file the same each time
    end = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name.encode()) + 4
    padding = -end % _ALIGNMENT
    info.extra = struct.pack("<2H", 0x4246, padding) + b"Z" * padding
    archive.writestr(info, data)
