"""One request to a WSGI app, run by a thread and read by an event loop: first the head, then the body as it comes.

What the app yields is there at once; pieces that came while nobody read are one. Whoever reads no further closes the
call, and the app sees the client gone (``nanogpt.client_gone`` in its environ) at its next look, as it sees that a
connection of gunicorn's was closed.
"""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Executor
from typing import Any, cast

from nanogpt.deploy.exchange import Head, Request

log = logging.getLogger(__name__)

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class AppFailed(Exception):
    """The app raised where its own handlers do not reach; its log has the traceback."""


async def call(app: App, request: Request, threads: Executor) -> AsyncGenerator[Head | bytes, None]:
    """The app's answer. Closing or cancelling this iterator ends the app's work for it.

    Raises: AppFailed.
    """
    running = _Call(app, request, asyncio.get_running_loop())
    done = threads.submit(running.run)
    try:
        async for part in running.parts():
            yield part
    finally:
        running.gone.set()
        done.cancel()  # where no thread has begun with it


class _Call:
    """Shared by the thread that runs the app and the loop that reads: the lock guards ``_pieces``."""

    def __init__(self, app: App, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.gone = threading.Event()
        self._app = app
        self._request = request
        self._loop = loop
        self._lock = threading.Lock()
        self._pieces: list[bytes] = []
        self._head: Head | None = None
        self._ended = self._failed = False
        self._news = asyncio.Event()

    async def parts(self) -> AsyncGenerator[Head | bytes, None]:
        head_told = False
        while True:
            await self._news.wait()
            self._news.clear()
            with self._lock:
                pieces, self._pieces = self._pieces, []
                head, ended, failed = self._head, self._ended, self._failed
            if head is not None and not head_told:
                head_told = True
                yield head
            if pieces:
                yield b"".join(pieces)
            if failed:
                raise AppFailed
            if ended:
                return

    # -- in the thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        if self.gone.is_set():
            return
        try:
            body = self._app(make_environ(self._request, self.gone.is_set), self._start_response)
            try:
                for piece in body:
                    if self.gone.is_set():
                        break
                    if piece:
                        self._tell(pieces=[piece])
            finally:
                if hasattr(body, "close"):
                    body.close()
            self._tell(ended=True)
        except Exception:
            log.exception("A request failed outside of the app's own handlers.")
            self._tell(failed=True)

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        self._head = Head(int(status.split(" ", 1)[0]), tuple(headers))
        return lambda data: self._tell(pieces=[data])

    def _tell(self, *, pieces: Iterable[bytes] = (), ended: bool = False, failed: bool = False) -> None:
        with self._lock:
            self._pieces += pieces
            self._ended |= ended
            self._failed |= failed
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:
            pass  # the loop has ended, and nobody reads any more


def make_environ(request: Request, client_gone: Callable[[], bool]) -> dict[str, Any]:
    """PEP 3333's environ. Its texts hold bytes as latin-1."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": request.prefix.encode().decode("latin-1"),
        "PATH_INFO": request.route.encode("utf-8", "surrogateescape").decode("latin-1"),
        "QUERY_STRING": request.query,
        "SERVER_NAME": request.host[0],
        "SERVER_PORT": str(request.host[1]),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": request.client,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": request.scheme,
        "wsgi.input": io.BytesIO(request.body),
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "nanogpt.client_gone": client_gone,
    }
    for name, value in request.headers:
        # X_Forwarded_For would become the same variable as X-Forwarded-For, which proxies set: it is dropped.
        if "_" in name:
            continue
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = f"HTTP_{key}"
        environ[key] = f"{cast(str, environ[key])},{value}" if key in environ else value
    return environ
