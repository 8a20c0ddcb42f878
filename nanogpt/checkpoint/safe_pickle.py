"""Reads pickles without running them: containers, text, numbers, and NumPy's as inert values.

Plain pickles (nanoGPT's ``meta.pkl``) are read by ``load_plain``; ``torch_file`` adds tensors on top. Does not know
zip files, tensors or tokenizers. Imports neither NumPy nor PyTorch.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from nanogpt.checkpoint import pickle_machine
from nanogpt.checkpoint.pickle_machine import MAX_BYTES, Admitted, Inert, check_key
from nanogpt.errors import CheckpointNotFound


def load_plain(path: str | os.PathLike[str]) -> Any:
    """The value in a plain pickle file such as nanoGPT's ``meta.pkl``: containers, text, numbers, NumPy scalars.

    Raises: CheckpointNotFound; CorruptCheckpoint; UnsafeCheckpoint naming the global that the file asks for.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointNotFound(f"There is no file {path}.") from None
    except OSError as error:
        raise CheckpointNotFound(f"Cannot read {path}: {error.strerror}.") from None
    return loads(data, source=str(path))


def loads(
    data: bytes,
    *,
    source: str,
    find_global: Callable[[str, str], Admitted | None] | None = None,
    load_persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value that the pickle describes. ``find_global`` may admit more than ``plain_global`` does."""
    return pickle_machine.run(data, source, find_global or plain_global, load_persistent)


# -- the globals of plain pickles -----------------------------------------------------------------------------


def plain_global(module: str, name: str) -> Admitted | None:
    """What every pickle may name: containers, NumPy values, and configuration classes as inert stand-ins."""
    if module.startswith("numpy.core."):
        module = "numpy._core." + module.removeprefix("numpy.core.")
    if module == "__builtin__":
        module = "builtins"
    full = f"{module}.{name}"
    if full in _PLAIN:
        return Admitted(full, _PLAIN[full])
    if name.endswith("Config") and name.isidentifier():
        return Admitted(full, lambda args: Inert(full, args))
    return None


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for pair in args[0] if args and isinstance(args[0], list) else ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("an OrderedDict is made of pairs")
        result[check_key(pair[0])] = pair[1]
    return result


def _set(args: tuple[Any, ...]) -> set[Any]:
    items = args[0] if args else []
    if not isinstance(items, (list, tuple)):
        raise ValueError("a set is made of a list")
    return {check_key(item) for item in items}


def _no_bytes(args: tuple[Any, ...]) -> bytes:
    if args:
        raise ValueError("bytes are only made empty by their name")
    return b""


def _encode(args: tuple[Any, ...]) -> bytes:
    text, encoding = args
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError("text can only be encoded to bytes as latin1")
    return text.encode("latin1")


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    """A NumPy number as Python's own; anything else stays inert."""
    dtype, data = args
    if isinstance(dtype, Inert) and dtype.args and isinstance(dtype.args[0], str) and isinstance(data, bytes):
        code = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I",
                "u2": "H", "u1": "B", "b1": "?"}.get(dtype.args[0])  # fmt: skip
        order = ">" if isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",) else "<"
        if code is not None:
            return struct.unpack(order + code, data)[0]
    return Inert("numpy.scalar", args)


def _inert(name: str) -> Callable[[tuple[Any, ...]], Inert]:
    return lambda args: Inert(name, args)


_PLAIN: Final[dict[str, Callable[[tuple[Any, ...]], Any] | None]] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "builtins.frozenset": lambda args: frozenset(_set(args)),
    "builtins.bytes": _no_bytes,
    "_codecs.encode": _encode,
    "numpy.ndarray": None,
    "numpy.dtype": _inert("numpy.dtype"),
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray._reconstruct": _inert("numpy.ndarray"),
    "numpy._core.numeric._frombuffer": _inert("numpy.ndarray"),
    "numpy.random._pickle.__randomstate_ctor": _inert("numpy.random.RandomState"),
    "numpy.random._pickle.__generator_ctor": _inert("numpy.random.Generator"),
    "numpy.random._pickle.__bit_generator_ctor": _inert("numpy.random.BitGenerator"),
    "numpy.random._mt19937.MT19937": None,
    "numpy.random._pcg64.PCG64": None,
    "numpy.random._pcg64.PCG64DXSM": None,
    "numpy.random._philox.Philox": None,
    "numpy.random._sfc64.SFC64": None,
    "numpy.random.bit_generator.SeedSequence": None,
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": _inert("numpy.random.SeedSequence"),
}
