"""The directory of a zip file whose members are stored as they are: where each member's bytes lie.

Reads what ``torch.save`` writes and nothing more. A compressed or encrypted member, two members over the same bytes,
two of the same name, a name that leaves the archive, or a directory that does not fit the file: refused. As nothing is
ever decompressed or extracted, a zip bomb has nothing to blow up. Does not know pickles or tensors.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, replace
from typing import Final

from nanogpt.checkpoint.mapped import MappedFile
from nanogpt.checkpoint.shown import shown
from nanogpt.errors import CorruptCheckpoint, UnsafeCheckpoint

MAX_MEMBERS: Final = 200_000  # GPT-2 XL with its optimizer has 1,750
MAX_DIRECTORY_BYTES: Final = 32 << 20

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED_FLAGS: Final = 0x1 | 0x40 | 0x2000


@dataclass(frozen=True, slots=True)
class Member:
    """``header`` is the offset of the member's own header, ``limit`` that of what follows its data."""

    name: str
    header: int
    limit: int
    size: int
    crc32: int


def is_zip(file: MappedFile) -> bool:
    return bytes(file.data[:4]) in (b"PK\x03\x04", b"PK\x05\x06")


def read_directory(file: MappedFile) -> dict[str, Member]:
    """The archive's members by name.

    Raises: CorruptCheckpoint; UnsafeCheckpoint for names that leave the archive.
    """
    directory, count, offset = _find_directory(file)
    found: list[Member] = []
    pos = 0
    for _ in range(count):
        if pos + _ENTRY.size > len(directory):
            raise _damaged(file, "its directory ends too early")
        (magic, _, _, flags, method, _, _, crc32, packed, size, name_len, extra_len, comment_len, _, _, _, header) = (
            _ENTRY.unpack_from(directory, pos)
        )
        name_end = pos + _ENTRY.size + name_len
        end = name_end + extra_len + comment_len
        if magic != b"PK\x01\x02" or end > len(directory):
            raise _damaged(file, "its directory is not readable")
        name = _name(file, directory[pos + _ENTRY.size : name_end])
        size, packed, header = _zip64(file, directory[name_end : name_end + extra_len], size, packed, header)
        if method != 0 or size != packed or flags & _ENCRYPTED_FLAGS:
            raise CorruptCheckpoint(
                f"{file.path} holds {shown(name)} compressed or encrypted; torch.save stores tensors as they are.",
                remedy="Save the checkpoint with torch.save, and do not zip it again.",
            )
        found.append(Member(name, header, offset, size, crc32))
        pos = end
    if pos != len(directory):
        raise _damaged(file, "its directory has bytes left over")
    found.sort(key=lambda member: member.header)
    members: dict[str, Member] = {}
    for member, following in itertools.zip_longest(found, found[1:]):
        limit = following.header if following else offset
        if member.name in members:
            raise _damaged(file, f"two members are called {shown(member.name)}")
        if member.header + _LOCAL.size + len(member.name) + member.size > limit:
            raise _damaged(file, f"{shown(member.name)} reaches into what follows it")
        members[member.name] = replace(member, limit=limit)
    return members


def data_start(file: MappedFile, member: Member) -> int:
    """Where the member's data begins: behind its own header, which must agree with the directory.

    Looked up when it is needed: a page of each of an optimizer's members would be a good part of the optimizer.
    """
    magic, *_, name_len, extra_len = _LOCAL.unpack(file.bytes(member.header, _LOCAL.size))
    start = member.header + _LOCAL.size + int(name_len) + int(extra_len)
    name = file.bytes(member.header + _LOCAL.size, name_len)
    if magic != b"PK\x03\x04" or name != member.name.encode("utf-8") or start + member.size > member.limit:
        raise _damaged(file, f"{shown(member.name)} is not where the directory says")
    return start


def _find_directory(file: MappedFile) -> tuple[bytes, int, int]:
    """The central directory's bytes, its number of entries, and its offset."""
    tail_start = max(0, file.size - _END.size - 0xFFFF)
    tail = bytes(file.data[tail_start:])
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise _damaged(file, "the directory at its end is missing")
    _, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(tail, at)
    end = tail_start + at
    if end + _END.size + comment != file.size:
        raise _damaged(file, "bytes follow its directory")
    if disk or first_disk or here != count:
        raise _damaged(file, "it is one part of several")
    located = end - _END64_LOCATOR.size
    if located >= 0 and bytes(file.data[located : located + 4]) == b"PK\x06\x07":
        _, _, end64, disks = _END64_LOCATOR.unpack(file.bytes(located, _END64_LOCATOR.size))
        magic, _, _, _, disk, first_disk, here, count, size, offset = _END64.unpack(file.bytes(end64, _END64.size))
        if magic != b"PK\x06\x06" or disk or first_disk or here != count or disks > 1:
            raise _damaged(file, "its 64-bit directory is not readable")
        end = end64
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise _damaged(file, f"its directory lists {count:,} members in {size:,} bytes")
    if offset + size != end:
        raise _damaged(file, "its directory is not where it says")
    return file.bytes(offset, size), count, offset


def _name(file: MappedFile, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _damaged(file, "a member's name is not text") from None
    if not name.isprintable() or name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name[:2]:
        raise UnsafeCheckpoint(f"{file.path} is not safe to read: a member's name leaves the archive: {shown(name)}.")
    return name


def _zip64(file: MappedFile, extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The values that did not fit into 32 bits, from the extra field with id 1."""
    pos = 0
    while pos + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, pos)
        if kind == 1:
            wide = extra[pos + 4 : pos + 4 + length]
            values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
            try:
                size = next(values) if size == 0xFFFFFFFF else size
                packed = next(values) if packed == 0xFFFFFFFF else packed
                header = next(values) if header == 0xFFFFFFFF else header
            except StopIteration:
                raise _damaged(file, "a 64-bit size is missing") from None
            break
        pos += 4 + length
    return size, packed, header


def _damaged(file: MappedFile, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{file.path} is damaged: {why}.", remedy="It was probably cut short while it was copied: copy it again."
    )
