"""A running server's admin routes, as ``reload``, ``rollback`` and ``models`` call them. The standard library alone."""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from nanogpt.errors import InvalidRequest, NanoGPTError, SettingsError

_TIMEOUT_S = 660.0
_MAX_ANSWER_BYTES = 16 * 2**20


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default="http://localhost:5000", metavar="URL", help="the server (default http://localhost:5000)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long to wait for the answer (default {_TIMEOUT_S:g}: longer than reload_timeout_s)",
    )
    parser.add_argument("--json", action="store_true", help="print the server's answer as JSON")


def call(args: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The server's answer.

    Raises: SettingsError without a key; NanoGPTError with the server's own words (exit code 2 when the request was
    wrong, 1 when it was refused or the server cannot be reached).
    """
    key = os.environ.get("ADMIN_KEY", "")
    if not key:
        raise SettingsError("ADMIN_KEY is not set.", remedy="Set it to the admin key that the server was started with.")
    if not key.isprintable():
        raise SettingsError("ADMIN_KEY has a line break or another control character, which no header can carry.")
    url = urlsplit(args.url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise InvalidRequest(f"--url is {args.url!r}; it must be like http://localhost:5000.", field="url")
    if not args.timeout > 0:
        raise InvalidRequest(f"--timeout is {args.timeout:g}; it must be above 0.", field="timeout")
    try:
        http_request = urllib.request.Request(  # noqa: S310 (the scheme was looked at)
            args.url.rstrip("/") + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "X-API-Key": key.encode().decode("latin-1")},
        )
        # A proxy cannot reach what is local here. A redirection is not followed: it would carry the key along.
        proxies: dict[str, str] | None = {} if is_local(args.url) else None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirection)
        with opener.open(http_request, timeout=args.timeout) as answer:
            return _object(answer.read(_MAX_ANSWER_BYTES), args.url)
    except urllib.error.HTTPError as error:
        raise _refusal(error.code, error.read(_MAX_ANSWER_BYTES), args.url) from None
    except TimeoutError:
        raise NanoGPTError(f"{args.url} did not answer within {args.timeout:g} s.") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise NanoGPTError(f"Cannot ask {args.url}: {getattr(reason, 'strerror', None) or reason}.") from None


def is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_path(path: str, url: str) -> str:
    """A path as the server understands it: a server on this machine may run in another folder than this one."""
    return os.path.abspath(path) if is_local(url) and os.path.exists(path) else path


def describe(model: dict[str, Any]) -> str:
    digest = str(model.get("digest") or "")[:12]
    return f"{model.get('name') or model.get('path') or 'the embedded model'}" + (f" ({digest})" if digest else "")


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _refusal(status: int, body: bytes, url: str) -> NanoGPTError:
    try:
        values = _object(body, url)
    except NanoGPTError:
        values = {}
    code = values.get("code")
    if status == 404 and code == "not_found":
        error = NanoGPTError(
            f"{url} has no admin routes.", remedy="Start the server with ADMIN_KEY set; the key goes into both."
        )
    else:
        message = str(values.get("error") or f"{url} answered {status}")
        error = NanoGPTError(message.removesuffix(".") + ".", remedy=values.get("remedy"))
    error.exit_code = 2 if status in (400, 401, 404) else 1
    return error


def _object(body: bytes, url: str) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise NanoGPTError(f"{url} answered something else than JSON: is it this server?")
    return values
