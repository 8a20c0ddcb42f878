"""A request's bytes to a JSON object, strictly: bounded, in its charset, no duplicate keys, no NaN, no endless nesting.

Every refusal is a 4xx that says what to send instead. Knows nothing of the object's fields: see ``schemas``.
"""

from __future__ import annotations

import encodings.aliases
import json
from typing import Any

from flask import Request

from nanogpt.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

# A client that sends nothing, or takes nothing, for this long is dropped: it would hold a thread for ever.
SOCKET_TIMEOUT_S = 60.0

# No setting or token id needs more digits; int() of a longer text takes quadratic time on older Pythons.
_MAX_DIGITS = 40
_CHUNK_BYTES = 64 * 1024

# Python's own codecs, which no client means: they are slow (quadratic) or are not charsets.
_NOT_CHARSETS = frozenset({"idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "mbcs", "oem"})
_CHARSETS = (
    frozenset(encodings.aliases.aliases) | frozenset(encodings.aliases.aliases.values()) | {"utf_8_sig"}
) - _NOT_CHARSETS


def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises: PayloadTooLarge, UnsupportedMediaType, InvalidRequest.
    """
    body = read_body(request, max_bytes)
    if request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        given = f", not {request.mimetype[:80]}" if request.mimetype else ""
        raise UnsupportedMediaType(
            f"The body must be application/json{given}.", remedy="Send the header Content-Type: application/json."
        )
    value = parse_json(decode_text(body, request.mimetype_params.get("charset")))
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {json_type(value)}.")
    return value


def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, whether its length is announced or it comes in chunks; never more than ``max_bytes`` of it."""
    too_large = PayloadTooLarge(
        f"The body is larger than {max_bytes} bytes.", remedy="Send less, or raise NANOGPT_MAX_BODY_BYTES."
    )
    length = request.content_length
    if length is None and "wsgi.input_terminated" not in request.environ:
        length = 0
    if length is not None and length > max_bytes:
        raise too_large
    sock = request.environ.get("gunicorn.socket")
    if sock is not None:
        sock.settimeout(SOCKET_TIMEOUT_S)
    stream = request.environ["wsgi.input"]
    parts: list[bytes] = []
    room = max_bytes + 1 if length is None else length
    try:
        while room > 0 and (part := stream.read(min(room, _CHUNK_BYTES))):
            parts.append(part)
            room -= len(part)
    except TimeoutError:
        raise InvalidRequest(f"The body did not arrive within {SOCKET_TIMEOUT_S:g} seconds.") from None
    except Exception:
        # A broken connection or malformed chunks; which errors tell of them differs between servers and versions.
        raise InvalidRequest("The body is incomplete or its chunks are malformed.") from None
    if length is None and room == 0:
        raise too_large
    if length is not None and room > 0:
        raise InvalidRequest("The body is shorter than its Content-Length.")
    return b"".join(parts)


def decode_text(body: bytes, charset: str | None) -> str:
    """The body's text. Without a charset: UTF-8, or UTF-16 and UTF-32 where the first bytes show it."""
    if charset is None:
        codec: str = json.detect_encoding(body)
    else:
        codec = charset.strip().lower().replace("-", "_")
        if codec not in _CHARSETS:
            raise UnsupportedMediaType(
                f"The charset {charset[:40]!r} is not known.", remedy="Send UTF-8: Content-Type: application/json."
            )
    try:
        return body.decode(codec).removeprefix("\ufeff")
    except LookupError:  # a codec that makes no text of bytes, such as zlib
        raise UnsupportedMediaType(f"The charset {str(charset)[:40]!r} is not one of text.") from None
    except ValueError as error:  # UnicodeError is one
        where = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise InvalidRequest(f"The body is not {charset or 'UTF-8'}{where}.") from None


def parse_json(text: str) -> Any:
    """Strict JSON. Raises: InvalidRequest."""
    if not text.strip():
        raise InvalidRequest("The body is empty.", remedy="Send a JSON object with the request's fields.")
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_int=_int, object_pairs_hook=_object)
        # Half of a surrogate pair is no text: no tokenizer takes it and no answer can carry it.
        (json.dumps(value, ensure_ascii=False) if "\\ud" in text.lower() else text).encode()
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise InvalidRequest("The body's JSON is nested too deeply.") from None
    except UnicodeEncodeError:
        raise InvalidRequest("The body holds half of a surrogate pair; such a text is not Unicode.") from None
    return value


def json_type(value: Any) -> str:
    """How a person who writes JSON calls the type of a value."""
    if value is None:
        return "null"
    return {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}.get(
        type(value), "an object"
    )


def _no_constant(name: str) -> Any:
    raise InvalidRequest(f"The body is not JSON: {name} is not a JSON number.")


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise InvalidRequest(f"The body holds a number of {len(digits)} digits; {_MAX_DIGITS} are admitted.")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequest(f"The field {key[:80]!r} is given twice.", field=key[:80])
            seen.add(key)
    return value
