"""Who may come in. With ``API_KEY`` or a keys file the server is closed: every route wants a key, but a few.

Keys are compared by digest and in constant time, so that neither a key's length nor its beginning can be measured.
Routes under ``/admin`` exist only where there is an admin key, and no other key opens them.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal

from flask import Request

from nanogpt.errors import Unauthorized
from nanogpt.keys import DEFAULT_NAME, Key, KeyRing
from nanogpt.web.caller import Caller

# What a load balancer and a first-time visitor ask without a key. Everything else is closed.
OPEN_ROUTES = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json", "/playground/<build>/<name>"})
ADMIN = "/admin/"

Access = Literal["open", "key", "admin"]


class Doorkeeper:
    """Lets in, and says who it is. Shared by the process's threads."""

    def __init__(self, api_key: str, keys: KeyRing | None = None, admin_key: str = "") -> None:
        self._api_key = _digest(api_key.encode("utf-8", "surrogateescape")) if api_key else None
        self._admin_key = _digest(admin_key.encode("utf-8", "surrogateescape")) if admin_key else None
        self._keys = keys

    def access(self, rule: str | None) -> Access:
        """What a route wants; None: one that does not exist."""
        if rule is not None and rule.startswith(ADMIN):
            return "admin"
        if (self._api_key is None and self._keys is None) or rule in OPEN_ROUTES:
            return "open"
        return "key"

    def identify(self, request: Request) -> Caller | None:
        """The owner of the key that a route wants; None where it wants none. Raises: Unauthorized."""
        access = self.access(request.url_rule.rule if request.url_rule is not None else None)
        if access == "open":
            return None
        if access == "admin":
            return self._admin(request)
        for key in _offered(request):
            if self._api_key is not None and hmac.compare_digest(_digest(key), self._api_key):
                return Caller(f"key:{DEFAULT_NAME}")
            if self._keys is not None and (found := self._keys.find(key)) is not None:
                return _caller(found)
        raise Unauthorized(
            "Invalid API key", remedy="Send the key in the header X-API-Key, or as Authorization: Bearer."
        )

    def _admin(self, request: Request) -> Caller:
        """This key, and no other, opens the routes under /admin. Raises: Unauthorized."""
        for key in _offered(request):
            if self._admin_key is not None and hmac.compare_digest(_digest(key), self._admin_key):
                return Caller("key:admin")
        raise Unauthorized(
            "Invalid admin key", remedy="Send ADMIN_KEY in the header X-API-Key, or as Authorization: Bearer."
        )


def _caller(key: Key) -> Caller:
    return Caller(f"key:{key.name}", key.requests_per_minute, key.tokens_per_minute, key.max_concurrency)


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
