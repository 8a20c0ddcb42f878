"""The load: clients of every kind over plain sockets, and the account of how each request ended.

One asyncio loop. A request that a client sent is in the account exactly once, under how it ended; what must never
happen (a 500, a stream without its end, two ends, an answer that never comes) is listed among the violations.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
# No request may take longer, whatever happens to the server meanwhile.
LIMIT_S = 60.0
REFUSALS = frozenset({400, 401, 404, 405, 409, 413, 415, 422, 429, 503, 504})


@dataclass
class Account:
    """How requests ended, and what should not have happened."""

    port: int
    key: str
    ends: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    """How long a 429 or 503 took to come."""
    tokens: int = 0
    last_cut: float = 0.0
    """When a worker was last killed: what it was answering is cut, and a slow reader may notice that late."""

    def violation(self, what: str) -> None:
        self.violations.append(what)

    def may_be_cut(self, since: float) -> bool:
        """Whether a request that began then may have lost its worker."""
        return self.last_cut >= since


class Cut(Exception):
    """The connection ended where an answer was expected."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def parts(self) -> AsyncIterator[bytes]:
        """The content as it comes. Raises: Cut when it ends before its end."""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int((await self._line()).split(b";")[0], 16):
                yield await self._exactly(size)
                await self._exactly(2)
            await self._exactly(2)
        else:
            yield await self._exactly(int(self.headers.get("content-length", "0")))

    async def _line(self) -> bytes:
        line = await self.reader.readline()
        if not line.endswith(b"\r\n"):
            raise Cut("inside the answer")
        return line[:-2]

    async def _exactly(self, size: int) -> bytes:
        try:
            return await self.reader.readexactly(size)
        except asyncio.IncompleteReadError:
            raise Cut("inside the answer") from None


@asynccontextmanager
async def ask(
    port: int, method: str, path: str, body: bytes = b"", *, receive_bytes: int = 0, **headers: str
) -> AsyncIterator[Answer]:
    """One request on a connection of its own. ``receive_bytes``: the size of the socket's buffer, for slow readers."""
    sock = socket.socket()
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.setblocking(False)
    writer = None
    try:
        await asyncio.get_running_loop().sock_connect(sock, (HOST, port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
        names = {"Host": f"{HOST}:{port}", "Connection": "close", "Content-Length": str(len(body))}
        if body:
            names["Content-Type"] = "application/json"
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in names.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        try:
            await writer.drain()
        except ConnectionError:
            pass  # refused before all of it was read; the answer may be there all the same
        yield await _answer(reader)
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise Cut(type(error).__name__) from None
    finally:
        if writer is not None:
            writer.transport.abort()
        else:
            sock.close()


async def _answer(reader: asyncio.StreamReader) -> Answer:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        raise Cut("before the answer") from None
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    return Answer(int(head[0].split()[1]), headers, reader)


# -- kinds of clients -------------------------------------------------------------------------------------------------


class Client:
    """One client that sends one request after the other, of kinds drawn by weight, until ``until``."""

    def __init__(self, account: Account, seed: int, until: float) -> None:
        self._account = account
        self._draw = random.Random(seed)
        self._until = until
        self._kinds = {
            self._plain: 5, self._stream: 8, self._repeated: 3, self._openai: 2, self._abort: 3, self._slow: 1,
            self._bad_json: 1, self._wrong_key: 1, self._huge: 1,
        }  # fmt: skip

    async def run(self) -> None:
        while time.monotonic() < self._until:
            kind = self._draw.choices(list(self._kinds), list(self._kinds.values()))[0]
            name = kind.__name__.strip("_")
            began = time.monotonic()
            try:
                end = await asyncio.wait_for(kind(), LIMIT_S)
            except TimeoutError:
                self._account.violation(f"{name}: nothing came within {LIMIT_S:g} s")
                end = "never"
            except Cut as cut:
                if not self._account.may_be_cut(began):
                    self._account.violation(f"{name}: the connection was cut {cut}")
                end = "cut"
            self._account.ends[f"{name}: {end}"] += 1
            if end.startswith("refused"):
                await asyncio.sleep(self._draw.uniform(0.05, 0.2))

    def _body(self, **fields: Any) -> dict[str, Any]:
        prompt = self._draw.choice(["To be", "ROMEO:", "Once upon a time", "My lord, the king is"])
        return {"prompt": prompt, "max_length": self._draw.randrange(8, 120), **fields}

    async def _post(self, body: Any, *, path: str = "/generate", key: str = "") -> tuple[str, dict[str, Any]]:
        """How it ended, and what it said."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = time.monotonic()
        async with ask(self._account.port, "POST", path, content, X_API_Key=key or self._account.key) as answer:
            said = json.loads(await answer.body())
            return self._end_of(answer.status, said, sent), said

    def _end_of(self, status: int, said: dict[str, Any], sent: float) -> str:
        if status == 200:
            return "done"
        if status not in REFUSALS:
            self._account.violation(f"status {status}: {said}")
        if status in (429, 503):
            self._account.refused_s.append(time.monotonic() - sent)
        error = said.get("error")
        code = said.get("code") or (error.get("code") if isinstance(error, dict) else None)
        return f"refused {status} {code}"

    async def _plain(self) -> str:
        end, said = await self._post(self._body())
        if end == "done":
            self._account.tokens += said["tokens_generated"]
        return end

    async def _repeated(self) -> str:
        """One of a few requests that always have the same answer."""
        end, _ = await self._post({"prompt": "To be", "max_length": 40, "seed": self._draw.randrange(3)})
        return end

    async def _openai(self) -> str:
        body = {"prompt": ["To be", "ROMEO:"], "max_tokens": 20, "n": 2}
        end, said = await self._post(body, path="/v1/completions")
        if end == "done" and len(said["choices"]) != 4:
            self._account.violation(f"4 choices were asked for, {len(said['choices'])} came")
        return end

    async def _bad_json(self) -> str:
        content = self._draw.choice([b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "a", "nonsense": 1}', b"\xff\xfe{"])
        return self._only("refused 4", (await self._post(content))[0])

    async def _wrong_key(self) -> str:
        return self._only("refused 401", (await self._post(self._body(), key="wrong"))[0])

    async def _huge(self) -> str:
        """A prompt that is too long, or a body that is too large."""
        size = self._draw.choice([5_000, 900_000, 3_000_000])
        return self._only("refused 4", (await self._post({"prompt": "a" * size}))[0])

    def _only(self, wanted: str, end: str) -> str:
        if not end.startswith((wanted, "refused 429", "refused 503")):
            self._account.violation(f"{wanted} was expected, not {end}")
        return end

    async def _stream(self) -> str:
        return await self._streamed(self._body())

    async def _slow(self) -> str:
        """Reads so slowly that every buffer on the way is full; then it gives up or reads on."""
        body = self._body(max_length=400)
        return await self._streamed(body, receive_bytes=2048, pause_s=0.05, leave_at=self._draw.choice([3.0, 40.0]))

    async def _abort(self) -> str:
        """Leaves in the middle, or at once."""
        return await self._streamed(self._body(max_length=300), leave_at=self._draw.choice([0.0, 0.05, 0.5]))

    async def _streamed(
        self, body: dict[str, Any], *, receive_bytes: int = 0, pause_s: float = 0.0, leave_at: float = LIMIT_S
    ) -> str:
        content = json.dumps({**body, "stream": True}).encode()
        sent = time.monotonic()
        port, key = self._account.port, self._account.key
        ends: list[str] = []
        async with ask(port, "POST", "/generate", content, receive_bytes=receive_bytes, X_API_Key=key) as answer:
            if answer.status != 200:
                return self._end_of(answer.status, json.loads(await answer.body()), sent)
            unread = b""
            async for part in answer.parts():
                unread += part
                *events, unread = unread.split(b"\n\n")
                ends += [end for event in events if (end := self._end_of_event(event))]
                if time.monotonic() - sent >= leave_at:
                    return "left"
                if pause_s:
                    await asyncio.sleep(pause_s)
        if len(ends) != 1:
            self._account.violation(f"a stream had {len(ends)} ends: {ends}")
        return ends[0] if ends else "no end"

    def _end_of_event(self, event: bytes) -> str:
        if event.startswith(b"event: error"):
            code: str = json.loads(event.partition(b"data: ")[2])["code"]
            if code == "internal_error":
                self._account.violation("an internal error in a stream")
            return f"error event {code}"
        if event.startswith(b"data: ") and b'"tokens_generated"' in event:
            self._account.tokens += json.loads(event[6:])["tokens_generated"]
            return "done"
        return ""


async def slowloris(account: Account, until: float, connections: int) -> None:
    """Connections that send a byte of their head now and then, and never come to its end."""
    writers: list[asyncio.StreamWriter] = []
    try:
        while time.monotonic() < until:
            while len(writers) < connections:
                _, writer = await asyncio.open_connection(HOST, account.port)
                writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\n")
                writers.append(writer)
            for writer in writers:
                writer.write(b"X")
            await asyncio.sleep(1.0)
            writers = [writer for writer in writers if not writer.transport.is_closing()]
    except OSError:
        pass  # the server has restarted a worker; the load goes on without these
    finally:
        for writer in writers:
            writer.transport.abort()


async def gigabyte(account: Account) -> None:
    """A body of 1 GB that is announced: refused before it is sent."""
    async with ask(account.port, "POST", "/generate", Content_Length="1000000000", X_API_Key=account.key) as answer:
        if answer.status != 413:
            account.violation(f"a body of 1 GB was answered {answer.status}")
        account.ends[f"gigabyte: refused {answer.status}"] += 1
