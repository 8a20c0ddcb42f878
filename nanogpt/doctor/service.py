"""A running service as a client meets it: a connection a request, and the moment at which each piece of an answer came.

The standard library's HTTP alone, because it tells when bytes arrive. The variables HTTP_PROXY and the like are not
used, and no redirection is followed: what is checked is the address that was given. Answers are bounded in size, time.
Keys go into a header, never into a message, and over plain HTTP to another machine only where that was allowed.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import ssl
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal
from urllib.parse import urlsplit

from nanogpt._version import __version__
from nanogpt.errors import InvalidRequest, NanoGPTError, SettingsError

KeyName = Literal["none", "api", "admin", "wrong"]

_MAX_BYTES = 16 * 2**20
_PROMPTS = ("Once upon a time", "\n", " ", "a", "0")


class Unreachable(NanoGPTError):
    """The service cannot be asked, or does not answer as HTTP has it."""


class TooSlow(Unreachable):
    """It did not answer within the time-out."""


@dataclass(frozen=True)
class Answer:
    """``pieces`` are the body as it arrived: seconds since the request was sent, and bytes."""

    status: int
    headers: http.client.HTTPMessage
    pieces: list[tuple[float, bytes]]
    asked_at: float
    """Wall clock, when the request was sent."""
    seconds: float
    certificate: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The JSON object of the body; empty for anything else."""
        try:
            values = json.loads(self.body)
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    @property
    def code(self) -> str:
        """The code of a refusal of our own; empty for anybody else's. OpenAI's routes have it one level deeper."""
        error = self.fields.get("error")
        code = error.get("code") if isinstance(error, dict) else self.fields.get("code")
        return code if isinstance(code, str) else ""

    def number(self, header: str) -> int | None:
        text = self.headers.get(header, "")
        return int(text) if text.isascii() and text.isdecimal() else None

    @property
    def front(self) -> str:
        """Who else than our server answered, as far as it says so: ``nginx/1.22.1``. Empty for nobody."""
        server, via = str(self.headers.get("Server", "")), str(self.headers.get("Via", ""))
        return via if via else "" if server.lower().startswith("gunicorn") else server or "a proxy"


class Service:
    """Raises, when made: InvalidRequest for a URL that is none, SettingsError for a key that may not be sent there."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        admin_key: str = "",
        timeout_s: float = 60.0,
        allow_plain_http: bool = False,
    ) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        try:
            self._port = parts.port
        except ValueError:
            self._port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or self._port == -1:
            raise InvalidRequest(f"--url is {url!r}; it must be like https://gpt.example.com.", field="url")
        if parts.username is not None or parts.query or parts.fragment:
            raise InvalidRequest(
                "--url holds a name, a query or a fragment; keys come from the environment.", field="url"
            )
        if not timeout_s > 0:
            raise InvalidRequest(f"--timeout is {timeout_s:g}; it must be above 0.", field="timeout")
        self.is_tls = parts.scheme == "https"
        self.host = parts.hostname
        self.is_local = is_loopback(self.host)
        self.is_private = self.is_tls or self.is_local
        """Whether nobody on the way can read what is sent."""
        self.has_api_key, self.has_admin_key = bool(api_key), bool(admin_key)
        self._prefix, self._timeout_s = parts.path, timeout_s
        self._keys = {"api": api_key, "admin": admin_key, "wrong": "nanogpt-doctor-tries-a-wrong-key"}
        for name, key in (("API_KEY", api_key), ("ADMIN_KEY", admin_key)):
            if not key.isprintable():
                raise SettingsError(f"{name} has a line break or another control character, which no header can carry.")
        if (api_key or admin_key) and not self.is_private and not allow_plain_http:
            raise SettingsError(
                f"The key would go to {self.host} over plain http, where everybody on the way can read it.",
                remedy="Use https, unset API_KEY and ADMIN_KEY, or say --allow-plain-http.",
            )

    def get(self, path: str, key: KeyName = "api", **headers: str) -> Answer:
        return self.ask("GET", path, key=key, headers=headers)

    def post(self, path: str, body: dict[str, Any], key: KeyName = "api", **more: Any) -> Answer:
        return self.ask("POST", path, key=key, body=body, **more)

    def ask(
        self,
        method: str,
        path: str,
        *,
        key: KeyName = "api",
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        source: str = "",
    ) -> Answer:
        """``source``: the address of ours that the request comes from. Raises: Unreachable."""
        sent = {"User-Agent": f"nanogpt-doctor/{__version__}", "Accept": "application/json, */*", **(headers or {})}
        if (secret := self._keys.get(key, "")) != "":
            sent["X-API-Key"] = secret.encode().decode("latin-1")
        if body is not None:
            sent["Content-Type"] = "application/json"
        connection = self._connection(source)
        try:
            connection.connect()
            certificate = connection.sock.getpeercert() if isinstance(connection.sock, ssl.SSLSocket) else None
            asked_at, since = time.time(), time.monotonic()
            connection.request(method, self._prefix + path, None if body is None else json.dumps(body).encode(), sent)
            answer = connection.getresponse()
            pieces = self._read(answer, since)
            seconds = time.monotonic() - since
            return Answer(answer.status, answer.headers, pieces, asked_at, seconds, certificate or {})
        except TimeoutError:
            raise TooSlow(
                f"{self.url}{path} did not answer within {self._timeout_s:g} s.",
                remedy="Is the address right, and does a firewall let it through? --timeout waits longer.",
            ) from None
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            raise Unreachable(
                f"The certificate or the TLS of {self.host} is not good: {reason}.",
                remedy="Renew the certificate, send the whole chain, and use the name that is in it.",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(
                f"Cannot ask {self.url}: {reason}.", remedy="Is the server started, and is the address the right one?"
            ) from None
        finally:
            connection.close()

    def _connection(self, source: str) -> http.client.HTTPConnection:
        address = (source, 0) if source else None
        if self.is_tls:
            return http.client.HTTPSConnection(
                self.host, self._port, timeout=self._timeout_s, source_address=address,
                context=ssl.create_default_context(),
            )  # fmt: skip
        return http.client.HTTPConnection(self.host, self._port, timeout=self._timeout_s, source_address=address)

    def _read(self, answer: http.client.HTTPResponse, since: float) -> list[tuple[float, bytes]]:
        """Raises: TimeoutError, HTTPException."""
        pieces: list[tuple[float, bytes]] = []
        left = _MAX_BYTES
        while data := answer.read1(65536):
            now = time.monotonic() - since
            pieces.append((now, data))
            left -= len(data)
            if left < 0:
                raise http.client.HTTPException(f"an answer of more than {_MAX_BYTES >> 20} MiB")
            if now > self._timeout_s:
                raise TimeoutError
        return pieces

    @cached_property
    def openapi(self) -> dict[str, Any]:
        """The service's description of itself; empty where it has none. Raises: Unreachable."""
        return self.get("/openapi.json", key="none").fields

    @cached_property
    def model_info(self) -> dict[str, Any]:
        """Empty where it is not told. Raises: Unreachable."""
        answer = self.get("/model_info")
        return answer.fields if answer.status == 200 else {}

    @cached_property
    def prompt(self) -> str:
        """A prompt that the model's vocabulary can say: character models know few. Raises: Unreachable."""
        for prompt in _PROMPTS:
            answer = self.post("/tokenize", {"prompt": prompt})
            if answer.code != "unknown_character":
                return prompt
        return _PROMPTS[0]

    @property
    def max_new_tokens(self) -> int:
        """The longest answer that /generate admits; the guide's 500 where it is not told."""
        try:
            return int(self.openapi["components"]["schemas"]["GenerateBody"]["properties"]["max_length"]["maximum"])
        except (KeyError, TypeError, ValueError):
            return 500

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Prometheus' page: ``name{labels}`` → value, as it was when it was first asked. Empty where it is closed."""
        answer = self.get("/metrics", Accept="text/plain")
        return parse_metrics(answer.body.decode("utf-8", "replace")) if answer.status == 200 else {}


def parse_metrics(text: str) -> dict[str, float]:
    """Each sample of a page in Prometheus' text format; lines that are none are left out."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            try:
                found[name] = float(value)
            except ValueError:
                continue
    return found


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def can_come_from(address: str) -> bool:
    """Whether this machine may use the address as its own."""
    try:
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
