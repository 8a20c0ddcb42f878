"""Load shedding: a client that is over its limit or found the queue full is refused, for a moment, before anything is
done for it.

Under a flood refusals are most of the work, and the engine needs the processors. So a request of such a client is
refused as soon as its bytes are there (``answer``, called by ``gunicorn_worker`` in the worker's main thread: without
gunicorn's parser, a thread or Flask), and where that is not to be had (``check``, called by the app), before its body
is read. Anything unusual about a request, and every other client, goes the ordinary way.

One ``LoadShedder`` a process, shared by its threads. The refusal, its line in the log and its place in the metrics are
those of every other one.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from flask import Flask, Request
from werkzeug.http import http_date

from nanogpt.errors import NanoGPTError, QueueFull, TooManyRequests
from nanogpt.settings import Settings
from nanogpt.web.answers import to_json
from nanogpt.web.auth import Doorkeeper
from nanogpt.web.caller import Caller
from nanogpt.web.client_address import client_address
from nanogpt.web.errors import error_content, error_headers
from nanogpt.web.limits import GENERATING_ROUTES
from nanogpt.web.metrics import metrics
from nanogpt.web.request_log import RequestLog, request_id

# For as long a client that found the queue full is told so unasked. Behind a queue of some length no place is lost
# meanwhile; a short one may be empty by then, and is always asked.
_FULL_S = 0.1
_LONG_QUEUE = 16
# And one that is over its limit: what is refused counts nothing, so before Retry-After nobody is refused in vain. Keys
# whose limits are changed, and the headers' seconds, are out of date for no longer.
_LIMITED_S = 1.0
_MAX_REMEMBERED = 1024
# Names that gunicorn takes as they are: it refuses or drops the others, and so they are left to it.
_NAME = re.compile(rb"[A-Za-z0-9-]+")
_LENGTH = re.compile(r"\d{1,9}")
_UNUSUAL = ("HTTP_TRANSFER_ENCODING", "HTTP_EXPECT", "HTTP_UPGRADE")


@dataclass(frozen=True)
class Refusal:
    """What goes back over the connection, and whether it stays open for the next request."""

    content: bytes
    keeps_alive: bool


@dataclass(frozen=True)
class _Memory:
    """Why a client is refused, and until when. ``one_asks``: afterwards one request goes on before the others do."""

    error: NanoGPTError
    until: float
    one_asks: bool


class LoadShedder:
    """Remembers who was refused."""

    def __init__(self, settings: Settings, doorkeeper: Doorkeeper) -> None:
        self._settings = settings
        self._doorkeeper = doorkeeper
        self._lock = threading.Lock()
        self._memories: dict[str, _Memory] = {}
        self._until = 0.0
        self._lines: dict[bytes, Any] = {}

    def learn_routes(self, app: Flask) -> None:
        """The routes that may be refused, once the app has them all."""
        for rule in app.url_map.iter_rules():
            if rule.rule in GENERATING_ROUTES:
                self._lines[f"POST {rule.rule} HTTP/1.1".encode()] = rule

    @property
    def is_active(self) -> bool:
        """Whether there is anybody to refuse. As long as there is not, nothing else here is of use."""
        return time.monotonic() < self._until

    def note_full(self, caller: Caller) -> None:
        """The engine refused this client because of a full queue."""
        if self._settings.max_queue >= _LONG_QUEUE:
            error = QueueFull("The server is busy: the queue is full.", remedy="Send the request again later.")
            self._remember(caller, error, _FULL_S, one_asks=True)

    def note_limited(self, caller: Caller, error: TooManyRequests) -> None:
        """This client has made all the requests that its limit admits."""
        self._remember(caller, error, min(_LIMITED_S, error.retry_after_s or 0.0), one_asks=False)

    def note_room(self, caller: Caller) -> None:
        """The engine took a request of this client."""
        if self._memories:
            with self._lock:
                self._memories.pop(caller.name, None)

    def check(self, caller: Caller) -> None:
        """Raises: QueueFull, TooManyRequests for a client that is to be refused.

        When the time of a full queue is over, the next request goes on to the engine, and all others wait for what
        becomes of that one.
        """
        now = time.monotonic()
        with self._lock:
            memory = self._memories.get(caller.name)
            if memory is None:
                return
            if now >= memory.until:
                del self._memories[caller.name]
        if now < memory.until:
            if isinstance(memory.error, TooManyRequests):
                metrics.refused("requests")
            # One error for many refusals: with its traceback it would keep every one's frames.
            raise memory.error.with_traceback(None)
        if memory.one_asks:
            self.note_full(caller)

    def _remember(self, caller: Caller, error: NanoGPTError, seconds: float, *, one_asks: bool) -> None:
        until = time.monotonic() + seconds
        with self._lock:
            if len(self._memories) >= _MAX_REMEMBERED:
                self._memories.clear()
            self._memories[caller.name] = _Memory(error, until, one_asks)
            self._until = max(self._until, until)

    def answer(self, data: bytes, peer: Any) -> Refusal | None:
        """The refusal of the request that ``data`` is; None where it is none, not a whole one, or not to be refused.

        ``peer``: the socket's other end, as ``accept`` tells it.
        """
        found = self._parse(data, peer)
        if found is None:
            return None
        request, keeps_alive = found
        caller = Caller(f"address:{client_address(request, self._settings.trusted_proxies)}")
        try:
            caller = self._doorkeeper.identify(request) or caller
            self.check(caller)
        except (QueueFull, TooManyRequests) as error:
            return Refusal(_refuse(request, caller, error, keeps_alive), keeps_alive)
        except NanoGPTError:
            pass  # the app says so itself
        return None

    def _parse(self, data: bytes, peer: Any) -> tuple[Request, bool] | None:
        """A plain request with all of its body, and whether its client wants the connection to stay."""
        head, end, body = data.partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        rule = self._lines.get(line)
        if rule is None or not end or head.count(b"\n") != len(fields):
            return None
        environ: dict[str, Any] = {"REQUEST_METHOD": "POST", "PATH_INFO": rule.rule}
        if isinstance(peer, tuple):
            environ["REMOTE_ADDR"] = peer[0]
        for field in fields:
            name, _, value = field.partition(b":")
            key = "HTTP_" + name.decode("latin-1").upper().replace("-", "_")
            if not _NAME.fullmatch(name) or key in environ:
                return None
            environ[key] = value.strip(b" \t").decode("latin-1")
        length = environ.get("HTTP_CONTENT_LENGTH", "")
        if any(name in environ for name in _UNUSUAL) or not _LENGTH.fullmatch(length) or len(body) != int(length):
            return None
        request = Request(environ)
        request.url_rule = rule
        return request, environ.get("HTTP_CONNECTION", "").lower() in ("", "keep-alive")


def _refuse(request: Request, caller: Caller, error: NanoGPTError, keeps_alive: bool) -> bytes:
    """The whole answer, after its lines in the log."""
    record = RequestLog.start(request, request_id(request))
    record.caller, record.outcome = caller.name, error.code
    content = to_json(error_content(error, request.path, record.request_id)) + b"\n"
    headers = {
        "Date": http_date(),
        "Connection": "keep-alive" if keeps_alive else "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        "X-Request-Id": record.request_id,
        **error_headers(error),
    }
    if record.trace.traceparent is not None:
        headers["traceparent"] = record.trace.traceparent
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    record.finish(error.status)
    status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    return f"{status}{lines}\r\n".encode("latin-1") + content
