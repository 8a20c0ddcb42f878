"""What was served, what is, and what was refused: one entry for each time that somebody chose a model.

Kept by the supervisor in memory, for as long as it lives; the oldest entries are forgotten.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

ModelState = Literal["loading", "serving", "standby", "retired", "failed"]
Role = Literal["main", "compare"]
"""``main``: the model that everybody gets. ``compare``: the second one, which requests have to name."""

_MAX_ENTRIES = 100
# A reason is for a person to read.
_MAX_REASON_CHARS = 1000


@dataclass(eq=False)
class Entry:
    """One choice of a model: ``checkpoint`` as it was asked for, the rest as the engine reported it."""

    checkpoint: str
    who: str
    """``start``, ``admin``, ``follow`` or ``rollback``."""
    at: float = field(default_factory=time.time)
    state: ModelState = "loading"
    reason: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    """``name``, ``path``, ``digest`` and ``card``, once an engine has loaded it."""
    role: Role = "main"

    @property
    def digest(self) -> str:
        return str(self.model.get("digest", ""))

    @property
    def what(self) -> str:
        """For a sentence in the log."""
        return str(self.model.get("name") or self.checkpoint or "the embedded model")

    @property
    def source(self) -> str:
        """What to load to get the same again: the very file, because a folder may hold a newer one by now."""
        path = str(self.model.get("path") or "")
        return path if path and os.path.exists(path) else self.checkpoint

    def set(self, state: ModelState, reason: str = "") -> None:
        self.state, self.reason = state, reason[:_MAX_REASON_CHARS]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.model.get("name"),
            "path": self.model.get("path") or self.checkpoint,
            "digest": self.model.get("digest"),
            "role": self.role,
            "who": self.who,
            "at": datetime.fromtimestamp(self.at, timezone.utc).isoformat(timespec="seconds"),
            "state": self.state,
            "reason": self.reason or None,
        }


class History:
    """The entries, newest last."""

    def __init__(self, role: Role = "main") -> None:
        self._role = role
        self._entries: list[Entry] = []

    def add(self, checkpoint: str, who: str, model: dict[str, Any] | None = None) -> Entry:
        entry = Entry(checkpoint, who, model=model or {}, role=self._role)
        self._entries.append(entry)
        if len(self._entries) > _MAX_ENTRIES:
            self._entries.remove(next(old for old in self._entries if old.state in ("retired", "failed")))
        return entry

    def to_list(self) -> list[dict[str, Any]]:
        return [entry.to_dict() for entry in self._entries]
