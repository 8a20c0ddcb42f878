"""Which weights a checkpoint holds: their SHA-256, remembered in the user's cache folder while its files stay the same.

The folder is NANOGPT_CACHE_DIR, else nanogpt/ in the user's cache folder; ``off`` keeps nothing. It may fail for any
reason (full, read-only, somebody else's): then the weights are hashed, as without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

from nanogpt.checkpoint.model_card import weights_sha256
from nanogpt.checkpoint.types import Checkpoint

_SETTLED_S = 10.0


def cache_folder() -> Path | None:
    """Where packed weights are kept; None where they are not to be."""
    chosen = os.environ.get("NANOGPT_CACHE_DIR", "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nanogpt"
    except RuntimeError:  # a user without a home
        return None


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights. It is remembered for the file as it is, because a start should not read all of it."""
    folder = cache_folder()
    identity = _file_identity(checkpoint.path) if folder is not None else None
    note = folder / f"{identity}.digest" if folder is not None and identity else None
    if note is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if note.stat().st_uid == os.geteuid():
                text = note.read_text()
                if re.fullmatch(r"[0-9a-f]{64}", text):
                    return text
    digest = weights_sha256(checkpoint)
    if note is not None:
        with contextlib.suppress(OSError):
            note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(suffix=".new", dir=note.parent)
            with open(descriptor, "w") as file:
                file.write(digest)
            os.replace(name, note)
    return digest


def _file_identity(path: Path) -> str | None:
    """A name for a checkpoint's files as they are now; None where they may still be changing.

    A file that was replaced between the loading and now would be taken for the loaded one: one that was written within
    the last seconds is hashed instead.
    """
    files = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    parts = []
    for file in files:
        status = file.stat()
        if time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_S:
            return None
        parts.append(
            (str(file.resolve()), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
