"""Who may come in: with ``API_KEY`` set, every route is closed but those of a short list.

The key is compared by digest and in constant time, so that neither its length nor its beginning can be measured.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from flask import Request

from nanogpt.errors import Unauthorized

# What a load balancer and a first-time visitor ask without a key. Everything else is closed.
OPEN_ROUTES = frozenset({"/", "/health", "/ready", "/openapi.json", "/docs"})


def make_check(api_key: str) -> Callable[[Request], None]:
    """The check that each request passes. Raises: Unauthorized."""
    wanted = _digest(api_key.encode("utf-8", "surrogateescape"))

    def check(request: Request) -> None:
        if not api_key or (request.url_rule is not None and request.url_rule.rule in OPEN_ROUTES):
            return
        if not any(hmac.compare_digest(_digest(key), wanted) for key in _offered(request)):
            raise Unauthorized(
                "Invalid API key", remedy="Send the key in the header X-API-Key, or as Authorization: Bearer."
            )

    return check


def make_admin_check(admin_key: str) -> Callable[[Request], None]:
    """The check of the routes under /admin: this key, and no other, opens them. Raises: Unauthorized."""
    wanted = _digest(admin_key.encode("utf-8", "surrogateescape"))

    def check(request: Request) -> None:
        if not admin_key or not any(hmac.compare_digest(_digest(key), wanted) for key in _offered(request)):
            raise Unauthorized(
                "Invalid admin key", remedy="Send ADMIN_KEY in the header X-API-Key, or as Authorization: Bearer."
            )

    return check


def _offered(request: Request) -> list[bytes]:
    """The keys that the request carries, as the bytes that were sent (WSGI hands headers over as Latin-1)."""
    offered = []
    if (key := request.headers.get("X-API-Key")) is not None:
        offered.append(key)
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        offered.append(credentials.strip())
    return [key.encode("latin-1", "replace") for key in offered]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
