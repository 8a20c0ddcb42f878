"""``serve log/ --follow``: watch a folder for the next checkpoint that a training run writes, and have it served.

Part of the supervisor, which calls ``tick`` in its one thread. Which file of a folder counts is ``locate``'s rule, the
same as at a start. Only looks at names, sizes and times; whether a file is good, the engine that loads it says.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from nanogpt.checkpoint.locate import locate
from nanogpt.engine.engines import Engines
from nanogpt.errors import CheckpointError

logger = logging.getLogger("nanogpt.engine")

# What identifies the state of a model's files: a file that is written, replaced or grows has another one.
_FileState = tuple[tuple[str, int, int, int], ...]
_MAX_FILES = 1000


class Follower:
    """Looks at the folder every ``follow_interval_s``.

    A checkpoint is loaded when its files have stayed the same over one interval: many training scripts write in place,
    and half a file is none. Each state of the files is tried once, whether it was served or refused, so that a bad file
    makes one line in the log, a rollback stays, and a file that is written again is tried again.
    """

    def __init__(self, engines: Engines, settings: dict[str, Any]) -> None:
        self._engines = engines
        self._folder = settings["model_checkpoint"]
        self._interval_s = float(settings["follow_interval_s"])
        self._loss_gate = None
        if settings["follow_loss_text"]:
            self._loss_gate = {"text": settings["follow_loss_text"], "max_loss": settings["follow_max_loss"]}
        self._seen: _FileState | None = None
        self._tried: _FileState | None = None
        self.next_at = 0.0

    def begin(self) -> None:
        """What lies there now is what the first engine loads."""
        self._tried = self._look()[1]
        self.next_at = time.monotonic() + self._interval_s

    def tick(self) -> None:
        """Look, if it is time."""
        now = time.monotonic()
        if now < self.next_at:
            return
        self.next_at = now + self._interval_s
        path, state = self._look()
        if state is None or state == self._tried:
            self._seen = None
        elif state != self._seen:
            self._seen = state
        elif not self._engines.is_busy:  # else the next time
            self._seen, self._tried = None, state
            self._engines.reload(path, "follow", self._loss_gate, lambda result: None)

    def _look(self) -> tuple[str, _FileState | None]:
        """The folder's checkpoint and its state; None while there is none, or while it is just being replaced."""
        try:
            found = locate(self._folder)
            if found.path.is_dir():
                files = sorted(file for file in found.path.iterdir() if file.is_file())[:_MAX_FILES]
            else:
                files = [found.weights]
            return str(found.path), tuple(map(_state, files))
        except (CheckpointError, OSError):
            return "", None


def _state(file: Path) -> tuple[str, int, int, int]:
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns, status.st_ino
