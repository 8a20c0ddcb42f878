"""The value that ``torch.save`` wrote, with tensors as views on the file, without PyTorch and without running it.

A ``.pt`` is a zip of ``data.pkl`` and raw storages. ``read`` gives the pickled value with ``LazyTensor`` in the
place of tensors: no storage is looked at until a tensor on it is opened, so an optimizer costs nothing.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nanogpt.checkpoint import safe_pickle
from nanogpt.checkpoint.lazy import NUMPY_DTYPE, LazyTensor, Span
from nanogpt.checkpoint.mapped import MappedFile, release_pages
from nanogpt.checkpoint.pickle_machine import MAX_BYTES, Admitted, Inert
from nanogpt.checkpoint.stored_zip import Member, data_start, read_directory
from nanogpt.checkpoint.types import DType, Tensor
from nanogpt.errors import CorruptCheckpoint, UnsupportedCheckpoint

Sizes = tuple[int, ...]

_CHUNK_BYTES: Final = 1 << 20

# Storage class → bytes an element, and the dtype where weights can have it.
_STORAGES: Final[dict[str, tuple[int, DType | None]]] = {
    "DoubleStorage": (8, "float64"),
    "FloatStorage": (4, "float32"),
    "HalfStorage": (2, "float16"),
    "BFloat16Storage": (2, "bfloat16"),
    "LongStorage": (8, None),
    "IntStorage": (4, None),
    "ShortStorage": (2, None),
    "CharStorage": (1, None),
    "ByteStorage": (1, None),
    "BoolStorage": (1, None),
    "UntypedStorage": (1, None),
}
_DTYPE_NAMES: Final = {"float64", "double", "float32", "float", "float16", "half", "bfloat16", "int64", "long", "int32",
                       "int", "int16", "short", "int8", "uint8", "bool"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that a pickle refers to: its member in the archive, found when a tensor on it is opened."""

    kind: str
    key: str
    numel: int


class TorchArchive:
    """An open ``.pt``. Kept alive by the tensors on it."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.members = read_directory(file)
        pickles = [name for name in self.members if name.endswith("/data.pkl") and name.count("/") == 1]
        if any("/code/" in name for name in self.members):
            raise UnsupportedCheckpoint(
                f"{file.path} is a TorchScript program, not a checkpoint.",
                remedy="Save the weights with torch.save(model.state_dict()) in the training script's own format.",
            )
        if len(pickles) != 1:
            raise UnsupportedCheckpoint(
                f"{file.path} is a zip file but not one that torch.save wrote: it has no data.pkl."
            )
        self.folder = pickles[0].removesuffix("data.pkl")
        order = self.members.get(self.folder + "byteorder")
        if order is not None and self._bytes(order) != b"little":
            raise UnsupportedCheckpoint(
                f"{file.path} was written on a big-endian machine, whose byte order is not read.",
                remedy="Load it there with torch.load and save it as safetensors.",
            )
        pickled = self.members[pickles[0]]
        self.data = self._bytes(pickled)
        self._verified: set[str] = set()

    def read(self) -> Any:
        """The pickled value.

        Raises: CorruptCheckpoint; UnsafeCheckpoint naming the global that the file asks for.
        """
        return safe_pickle.loads(
            self.data,
            source=str(self.file.path),
            find_global=lambda module, name: self._global(module, name) or safe_pickle.plain_global(module, name),
            load_persistent=_storage,
        )

    def _member(self, storage: Storage, name: str) -> Member:
        member = self.members.get(f"{self.folder}data/{storage.key}")
        size = storage.numel * _STORAGES[storage.kind][0]
        if member is None or member.size < size:
            raise CorruptCheckpoint(
                f"{self.file.path} is damaged: the storage of {name} should have {size:,} bytes and has"
                f" {member.size if member else 0:,}."
            )
        return member

    def _open(self, storage: Storage, offset: int, shape: Sizes, strides: Sizes, name: str) -> Tensor:
        dtype = _STORAGES[storage.kind][1]
        if dtype is None:
            raise UnsupportedCheckpoint(f"{self.file.path}: {name} holds no weights but a torch.{storage.kind}.")
        if not _is_dense(shape, strides) or offset + math.prod(shape) > storage.numel:
            raise CorruptCheckpoint(
                f"{self.file.path} is damaged: {name} of shape {list(shape)} does not fit its storage of"
                f" {storage.numel:,} elements."
            )
        size = _STORAGES[storage.kind][0]
        flat = self.file.array(
            NUMPY_DTYPE[dtype], data_start(self.file, self._member(storage, name)) + offset * size, math.prod(shape)
        )
        steps = tuple(stride * size for stride in strides)
        return Tensor(dtype, np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False))

    def _verify(self, storage: Storage, name: str) -> None:
        if storage.key not in self._verified:
            self._compare_checksum(self._member(storage, name), name)
            self._verified.add(storage.key)

    def _compare_checksum(self, member: Member, name: str) -> None:
        # torch.serialization.set_crc32_options(False) writes zeros: nothing to compare with.
        start = data_start(self.file, member)
        if member.crc32 and _crc32(self.file.array("u1", start, member.size)) != member.crc32:
            raise CorruptCheckpoint(
                f"{self.file.path} is damaged: the bytes of {name} do not have the checksum that was saved with them.",
                remedy="Copy the file again.",
            )

    def _bytes(self, member: Member) -> bytes:
        if member.size > MAX_BYTES:
            raise CorruptCheckpoint(f"{self.file.path} is damaged: its {member.name} has {member.size:,} bytes.")
        self._compare_checksum(member, member.name)
        return self.file.bytes(data_start(self.file, member), member.size)

    def _global(self, module: str, name: str) -> Admitted | None:
        full = f"{module}.{name}"
        if full == "torch._utils._rebuild_tensor_v2":
            return Admitted(full, self._tensor)
        if full in ("torch._utils._rebuild_parameter", "torch.Size"):
            return Admitted(full, lambda args: args[0])
        if full in ("torch.device", "torch.serialization._get_layout"):
            return Admitted(full, lambda args: Inert(full, args))
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return Admitted(name)
        if module == "torch" and name in _DTYPE_NAMES:
            return Admitted(full)
        return None

    def _tensor(self, args: tuple[Any, ...]) -> LazyTensor:
        storage, offset, shape, strides = args[:4]
        if not isinstance(storage, Storage) or not _is_size(offset) or not _are_sizes(shape) or not _are_sizes(strides):
            raise ValueError("a tensor has no storage, or its shape is not made of sizes")
        if len(shape) != len(strides) or len(shape) > 8:
            raise ValueError("a tensor's strides do not fit its shape")
        return LazyTensor(
            shape=shape,
            span=Span((self.file.path, storage.key), offset, offset + math.prod(shape)),
            open=lambda name: self._open(storage, offset, shape, strides, name),
            is_floating=_STORAGES[storage.kind][1] is not None,
            verify=lambda name: self._verify(storage, name),
        )


def _storage(value: Any) -> Storage:
    """The persistent id that torch.save writes: ("storage", its class, its key, the device, its length)."""
    if isinstance(value, tuple) and len(value) == 5:
        kind, storage, key, _, numel = value
        known = kind == "storage" and isinstance(storage, Admitted) and storage.name in _STORAGES
        if known and isinstance(key, str) and key.isascii() and key.isalnum() and _is_size(numel):
            return Storage(storage.name, key, numel)
    raise ValueError("it refers to something that is not a storage")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_size(item) for item in value)


def _is_dense(shape: Sizes, strides: Sizes) -> bool:
    """Whether the elements lie side by side, in any order of the dimensions, each once."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _crc32(data: npt.NDArray[Any]) -> int:
    value = 0
    for i in range(0, len(data), _CHUNK_BYTES):
        piece = data[i : i + _CHUNK_BYTES]
        value = zlib.crc32(piece.data, value)
        release_pages(piece)
    return value
