"""The keys file: who may come in besides the holder of ``API_KEY``, and how much each may ask for.

A key is 32 random bytes. The file keeps its SHA-256, which tells nothing of it: what nobody can guess needs no slow
hash. ``nanogpt keys`` writes the file, whole or not at all; servers read it, and follow its changes (``KeyRing``).
JSON, so that it can be made by other tools as well:

    {"version": 1, "keys": [{"name": "alice", "sha256": "…", "created": "2026-01-01T00:00:00Z",
                             "requests_per_minute": 60, "tokens_per_minute": 10000, "max_concurrency": 4}]}
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.errors import InvalidRequest, SettingsError

log = logging.getLogger(__name__)

VERSION = 1
DEFAULT_NAME = "default"
"""The name of whoever has ``API_KEY``."""
MAX_LIMIT = 1_000_000_000
_MAX_BYTES = 16 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
# How often a server looks whether the file has changed.
_LOOK_S = 1.0


@dataclass(frozen=True)
class Key:
    """A key as the file has it. A limit of None is not set."""

    name: str
    sha256: str
    created: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None


LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency")
_FIELDS = frozenset(field.name for field in dataclasses.fields(Key))


def new_key() -> str:
    """``ngk_`` and 32 random bytes."""
    return "ngk_" + base64.b32encode(secrets.token_bytes(32)).decode().rstrip("=").lower()


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


# -- the file -------------------------------------------------------------------------------------------------


def read_keys(path: Path) -> list[Key]:
    """The file's keys. Raises: SettingsError when it is missing, damaged, or open to others."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SettingsError(
            f"There is no keys file {path}.", remedy="nanogpt keys add NAME makes it.", field="keys_file"
        ) from None
    except OSError as error:
        raise SettingsError(f"Cannot read the keys file {path}: {error.strerror}.", field="keys_file") from None
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise SettingsError(f"The keys file {path} is not a file.", field="keys_file")
        if found.st_mode & 0o077:
            raise SettingsError(
                f"The keys file {path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}).",
                remedy=f"chmod 600 {path}",
                field="keys_file",
            )
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise SettingsError(f"The keys file {path} is larger than {_MAX_BYTES:,} bytes.", field="keys_file")
    try:
        return _parse(json.loads(data))
    except (ValueError, RecursionError) as error:
        what = "is not JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, RecursionError)) else error
        raise SettingsError(f"The keys file {path} {what}.", field="keys_file") from None


def _parse(values: Any) -> list[Key]:
    """Raises: ValueError that goes on after "The keys file …". It never quotes what may be a key."""
    if not isinstance(values, dict) or not isinstance(values.get("keys"), list) or set(values) != {"version", "keys"}:
        raise ValueError('must be an object with "version" and a list "keys"')
    if values["version"] != VERSION:
        raise ValueError(f"must have the version {VERSION}")
    keys = [_parse_key(number, item) for number, item in enumerate(values["keys"], 1)]
    for field in ("name", "sha256"):
        if len({getattr(key, field) for key in keys}) < len(keys):
            raise ValueError(f"has a {field} twice")
    return keys


def _parse_key(number: int, item: Any) -> Key:
    where = f"has a wrong key (number {number})"
    if not isinstance(item, dict) or not _FIELDS.issuperset(item):
        raise ValueError(f"{where}: it must be an object with no other fields than {', '.join(sorted(_FIELDS))}")
    if not isinstance(item.get("name"), str) or not _NAME.fullmatch(item["name"]) or item["name"] == DEFAULT_NAME:
        raise ValueError(f"{where}: {_name_rule()}")
    if not isinstance(item.get("sha256"), str) or not _DIGEST.fullmatch(item["sha256"]):
        raise ValueError(f"{where}: sha256 must be 64 lowercase hexadecimal digits")
    if not isinstance(item.get("created", ""), str):
        raise ValueError(f"{where}: created must be text")
    for name in LIMITS:
        value = item.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= MAX_LIMIT):
            raise ValueError(f"{where}: {name} must be an integer between 1 and {MAX_LIMIT:,}")
    return Key(**item)


def _name_rule() -> str:
    return f"a name is 1 to 64 letters, digits and ._@-, and not {DEFAULT_NAME} (that is API_KEY's)"


def add_key(path: Path, name: str, limits: Mapping[str, int | None]) -> str:
    """Write a new key into the file, which is made if it is not there, and return it: it can never be read again.

    Raises: InvalidRequest, SettingsError.
    """
    if not _NAME.fullmatch(name) or name == DEFAULT_NAME:
        raise InvalidRequest(f"The name {name!r} is not admitted: {_name_rule()}.", field="name")
    key = new_key()
    created = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    with _locked(path):
        keys = read_keys(path) if path.exists() else []
        if any(known.name == name for known in keys):
            raise InvalidRequest(
                f"There is a key of the name {name} already.", field="name", remedy=f"nanogpt keys revoke {name} first."
            )
        _write(path, [*keys, Key(name, digest(key.encode()), created, **limits)])
    return key


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of the file. Raises: InvalidRequest, SettingsError."""
    with _locked(path):
        keys = read_keys(path)
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise InvalidRequest(f"There is no key of the name {name!r}.", remedy="nanogpt keys list", field="name")
        _write(path, left)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The lock lies beside the file, which is replaced as a whole."""
    try:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"Cannot write the keys file {path}: {error.strerror}.", field="keys_file") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write(path: Path, keys: list[Key]) -> None:
    items = [{k: v for k, v in dataclasses.asdict(key).items() if v is not None} for key in keys]
    data = json.dumps({"version": VERSION, "keys": items}, indent=2) + "\n"
    path = path.resolve()  # a symbolic link stays one
    fresh = Path(f"{path}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            if path.exists() and os.geteuid() == 0:  # root writes for the server's user, who must go on reading it
                owner = path.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise SettingsError(f"Cannot write the keys file {path}: {error.strerror}.", field="keys_file") from None


# -- in a server ----------------------------------------------------------------------------------------------


class KeyRing:
    """The keys that a server knows now. Follows the file within a second; a file that is broken changes nothing.

    Safe to share between threads, and to be carried over a fork.
    """

    def __init__(self, path: Path) -> None:
        """Raises: SettingsError."""
        self.path = path
        self._lock = threading.Lock()
        self._look_at = 0.0
        self._seen = _signature(path)
        self._complained_of: tuple[int, ...] | None = None
        self._by_digest = {key.sha256: key for key in read_keys(path)}

    def __len__(self) -> int:
        return len(self._by_digest)

    def find(self, key: bytes) -> Key | None:
        """Whose key this is. The table is asked for the key's digest: how long that takes tells of no key."""
        self.refresh()
        wanted = digest(key)
        found = self._by_digest.get(wanted)
        return found if found is not None and hmac.compare_digest(found.sha256, wanted) else None

    def refresh(self, *, now: bool = False) -> None:
        """Look whether the file has changed: ``now``, or if that was not done within the last second."""
        moment = time.monotonic()
        if not now and (moment < self._look_at or not self._lock.acquire(blocking=False)):
            return
        if now:
            self._lock.acquire()
        try:
            self._look_at = moment + _LOOK_S
            seen = _signature(self.path)
            if seen != self._seen:
                self._by_digest = {key.sha256: key for key in read_keys(self.path)}
                self._seen = seen
                log.info("Keys: %d are known now.", len(self._by_digest))
        except SettingsError as error:
            if seen != self._complained_of:
                self._complained_of = seen
                log.error("The former keys stay: %s", error)
        finally:
            self._lock.release()


def _signature(path: Path) -> tuple[int, ...]:
    """What changes when the file does."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode)
