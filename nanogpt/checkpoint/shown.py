"""Words out of a file, as they may appear in a message: short, and nothing that a terminal would obey."""

from __future__ import annotations

from typing import Any


def shown(value: Any, limit: int = 80) -> str:
    """The text of a value, cut, and escaped where it has characters that are not printable."""
    text = value[: limit + 1] if isinstance(value, str) else repr(value)
    if len(text) > limit:
        text = text[:limit] + "…"
    return text if text.isprintable() else ascii(text)
