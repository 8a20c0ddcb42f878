"""How answers look on the wire: JSON with its characters unescaped, and server-sent events."""

from __future__ import annotations

import json
from typing import Any

from flask import Response

PING = b": ping\n\n"

_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def to_json(value: Any) -> bytes:
    """UTF-8. What UTF-8 cannot carry (half of a surrogate pair) stays an escape, which JSON can."""
    return _encoder.encode(value).encode("utf-8", "backslashreplace")


def json_response(value: Any, status: int = 200) -> Response:
    return Response(to_json(value) + b"\n", status, mimetype="application/json")


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event. Source: the WHATWG HTML standard, section 9.2."""
    # JSON holds no line breaks of its own, so one data line is enough.
    return (b"event: %b\n" % name.encode() if name else b"") + b"data: " + to_json(value) + b"\n\n"
