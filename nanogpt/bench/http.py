"""HTTP/1.1 as a load generator needs it: kept connections, and for every byte of an answer when it came.

Owned by one asyncio loop. An answer is only taken apart into its body while it comes (that is cheap, and shows its
end); what the body says is read afterwards, by ``stream``. Nothing here raises for what a server does: an answer that
went wrong says so in ``failure``.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from nanogpt.errors import InvalidRequest

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 2**20
# Kinds of failure that are not an HTTP status.
CONNECT, CUT, TIMEOUT, PROTOCOL = "connect", "cut", "timeout", "protocol"


@dataclass(frozen=True)
class Target:
    """Where requests go. ``prefix`` is the part of the path before ``/v1``; ``key`` is sent as a bearer token."""

    host: str
    port: int
    tls: bool
    prefix: str = ""
    key: str = ""

    @classmethod
    def parse(cls, url: str, key: str = "") -> Target:
        """Raises: InvalidRequest."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise InvalidRequest(
                f"The URL is {url!r}; it must be like http://localhost:5000 (without user, password or query).",
                field="url",
            )
        if not key.isascii() or not (key.isprintable() or not key):
            raise InvalidRequest("The API key has characters that no header can carry.", field="key")
        prefix = parts.path.rstrip("/")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, prefix.removesuffix("/v1"), key)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}", "User-Agent: nanogpt-bench"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body


class Answer:
    """One answer as it comes. ``body[:ends[i]]`` was there at ``times[i]`` (seconds of ``time.perf_counter``).

    ``failure`` is empty, or says how the exchange ended instead of with a whole answer. ``status`` 0: no head came.
    """

    __slots__ = (
        "_chunked", "_last", "_left", "_line", "_skip", "body", "ended", "ends", "failure", "finished", "headers",
        "keep", "started", "status", "times",
    )  # fmt: skip

    def __init__(self, finished: asyncio.Future[None] | None = None) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.times: list[float] = []
        self.ends: list[int] = []
        self.started = 0.0
        self.ended = 0.0
        self.failure = ""
        self.keep = False
        self.finished = finished
        self._line = b""  # what is not understood yet: the head, or a piece of a chunk's size
        self._left = 0  # bytes of the body, or of the chunk, that are still to come; -1: until the connection ends
        self._skip = 0  # bytes of the line end behind a chunk that are still to come
        self._chunked = False
        self._last = False  # the chunk of size 0 was there; lines up to an empty one follow

    def feed(self, data: bytes, now: float) -> bool:
        """Take what has come. True when the answer is whole. Raises: ValueError for what is not HTTP."""
        if not self.status:
            data = self._head(data)
            if not self.status:
                return False
        before = len(self.body)
        if self._chunked:
            whole = self._chunks(data)
        else:
            self.body += data if self._left < 0 else data[: self._left]
            if self._left > 0:
                self._left -= min(len(data), self._left)
            whole = self._left == 0
        if len(self.body) > before:
            self.times.append(now)
            self.ends.append(len(self.body))
            if len(self.body) > MAX_BODY_BYTES:
                raise ValueError("the answer is too long")
        return whole

    def closed(self) -> bool:
        """The connection has ended: whether the answer is whole by that."""
        return bool(self.status) and not self._chunked and self._left < 0

    def _head(self, data: bytes) -> bytes:
        """What follows the head; the status stays 0 while it is incomplete."""
        self._line += data
        head, found, rest = self._line.partition(b"\r\n\r\n")
        if not found:
            if len(head) > MAX_HEAD_BYTES:
                raise ValueError("the head is too long")
            return b""
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"not HTTP/1: {first[:40]!r}")
        code = int(status[:3])
        if code < 200:  # 100 Continue and its like: the answer follows
            self._line = b""
            return self._head(rest)
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        self._left = 0 if self._chunked or code in (204, 304) else int(self.headers.get("content-length", -1))
        connection = self.headers.get("connection", "").lower()
        self.keep = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
        self.status = code
        self._line = b""
        return rest

    def _chunks(self, data: bytes) -> bool:
        if self._line:
            data, self._line = self._line + data, b""
        at, size = 0, len(data)
        while at < size:
            if self._left:
                piece = data[at : at + self._left]
                self.body += piece
                at += len(piece)
                self._left -= len(piece)
                self._skip = 0 if self._left else 2
            elif self._skip:
                skipped = min(self._skip, size - at)
                at += skipped
                self._skip -= skipped
            else:
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._line = data[at:]
                    if len(self._line) > MAX_HEAD_BYTES:
                        raise ValueError("a chunk without its size")
                    return False
                line, at = data[at:end], end + 2
                if self._last:
                    if not line:
                        return True
                else:
                    self._left = int(line.split(b";")[0], 16)
                    self._last = self._left == 0
        return False


class Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.transport: asyncio.Transport | None = None
        self.answer: Answer | None = None
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        answer = self.answer
        if answer is None:  # nobody asked
            self.abort()
            return
        self._pool.received(data)
        try:
            whole = answer.feed(data, now)
        except ValueError:
            self.end(PROTOCOL, now)
            return
        if whole:
            self.end("", now)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self.answer is not None:
            self.end("" if error is None and self.answer.closed() else CUT, time.perf_counter())

    def end(self, failure: str, now: float) -> None:
        """The exchange has ended. The connection is kept where it can be."""
        answer, self.answer = self.answer, None
        if answer is None:
            return
        answer.failure, answer.ended = failure, now
        if answer.finished is not None and not answer.finished.done():
            answer.finished.set_result(None)
        if failure or not answer.keep:
            self.abort()
        else:
            self._pool.keep(self)

    def time_out(self) -> None:
        self.end(TIMEOUT, time.perf_counter())

    def abort(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.abort()


class Pool:
    """Connections to one server: made when none is free, kept when an answer has ended.

    ``events`` counts the blank lines of all answers as they come: what a live display shows.
    """

    def __init__(self, target: Target, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context() if target.tls else None
        self._free: deque[Connection] = deque()
        self.events = 0

    def received(self, data: bytes) -> None:
        self.events += data.count(b"\n\n")

    def keep(self, connection: Connection) -> None:
        self._free.append(connection)

    def close(self) -> None:
        while self._free:
            self._free.pop().abort()

    def post(self, path: str, body: bytes) -> bytes:
        """A request's bytes, for ``exchange``."""
        return self._target.request("POST", path, body)

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Send one request and wait for its answer. The clock starts before a connection is looked for."""
        return await self.exchange(self._target.request(method, path, body), Answer())

    async def exchange(self, request: bytes, answer: Answer) -> Answer:
        """The same for bytes that are ready, into an answer that the caller may watch."""
        answer.started = time.perf_counter()
        loop = asyncio.get_running_loop()
        deadline = answer.started + self._timeout_s
        while True:
            connection = self._kept()
            reused = connection is not None
            if connection is None:
                try:
                    connection = await asyncio.wait_for(self._connect(), max(0.001, deadline - time.perf_counter()))
                except (OSError, asyncio.TimeoutError) as error:  # two classes in Python 3.10
                    late = isinstance(error, asyncio.TimeoutError) and time.perf_counter() >= deadline
                    answer.failure, answer.ended = TIMEOUT if late else CONNECT, time.perf_counter()
                    return answer
            answer.finished = loop.create_future()
            connection.answer = answer
            assert connection.transport is not None
            connection.transport.write(request)
            timer = loop.call_later(deadline - time.perf_counter(), connection.time_out)
            try:
                await answer.finished
            finally:
                timer.cancel()
                if connection.answer is answer:  # cancelled
                    connection.answer = None
                    connection.abort()
            # A kept connection that the server closed at that moment: as every client does, once more on a new one.
            if reused and answer.failure == CUT and not answer.status and not answer.times:
                answer.failure = ""
                self.close()
                continue
            return answer

    def _kept(self) -> Connection | None:
        while self._free:
            connection = self._free.pop()
            if connection.open and connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self), self._target.host, self._target.port, ssl=self._tls
        )
        return connection
