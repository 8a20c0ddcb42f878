"""Writes pickles of plain data (protocol 2), and names of globals where PyTorch's format needs them.

``pickle.dumps`` would do for the data; the names and persistent ids of ``torch.save`` it writes only for objects of
the classes themselves, which need PyTorch. No memo: shared objects are written again.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """A module's name, as ``GLOBAL`` writes it."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What ``REDUCE`` makes on loading: a global called with arguments."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Persistent:
    """An object that lies outside the pickle."""

    id: tuple[Any, ...]


def dumps(value: Any) -> bytes:
    """The pickle of a value made of None, bool, int, float, str, dict, list, tuple and the classes above.

    Raises: TypeError for anything else.
    """
    out = bytearray(b"\x80\x02")
    _write(out, value)
    out += b"."
    return bytes(out)


def _write(out: bytearray, value: Any) -> None:
    if value is None:
        out += b"N"
    elif isinstance(value, bool):
        out += b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        out += b"J" + struct.pack("<i", value) if len(data) <= 4 else b"\x8a" + bytes((len(data),)) + data
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(data)) + data
    elif isinstance(value, Mapping):
        out += b"}("
        for key, item in value.items():
            _write(out, key)
            _write(out, item)
        out += b"u"
    elif isinstance(value, (list, tuple)):
        out += b"](" if isinstance(value, list) else b"("
        for item in value:
            _write(out, item)
        out += b"e" if isinstance(value, list) else b"t"
    elif isinstance(value, Global):
        out += f"c{value.module}\n{value.name}\n".encode()
    elif isinstance(value, Call):
        _write(out, value.function)
        _write(out, value.args)
        out += b"R"
    elif isinstance(value, Persistent):
        _write(out, value.id)
        out += b"Q"
    else:
        raise TypeError(f"a {type(value).__name__} is not plain data")
