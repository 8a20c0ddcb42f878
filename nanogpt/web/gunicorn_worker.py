"""gunicorn's threaded worker: asks the load shedder before a request costs anything, and lends streams its sockets.

Where it is not used (``-k gthread``), the app itself asks, only later, and each stream's own thread writes all of it.
What is here runs in the worker's main thread.
"""

from __future__ import annotations

import socket
import time
from functools import partial
from selectors import EVENT_READ
from types import FrameType
from typing import Any

from gunicorn.workers.gthread import TConn, ThreadWorker

from nanogpt.web.shedding import LoadShedder, Refusal

# The largest request that is looked at; whatever is longer goes the ordinary way.
_MAX_BYTES = 1 << 16


class SheddingWorker(ThreadWorker):  # type: ignore[misc]
    """Set as gunicorn's ``worker_class``."""

    shedder: LoadShedder | None = None

    def lend_sockets(self) -> None:
        """Called where the app is this product's own and nobody's middleware sees what it answers."""
        if not self.cfg.is_ssl and self.cfg.protocol == "http":
            self.wsgi: Any = partial(_lend_socket, self.wsgi)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """Ctrl-C comes twice, from the terminal and from the arbiter, and at any moment: the main thread may hold the
        lock of its thread pool just then, which gunicorn's handler would wait for, for ever. The main loop holds none.
        """
        self.method_queue.defer(super().handle_quit, sig, frame)

    def enqueue_req(self, conn: TConn) -> None:
        """Every connection comes here when it is new, and when it has sent something."""
        if self.shedder is None or not self.shedder.is_active or self.cfg.is_ssl or _has_read_ahead(conn):
            super().enqueue_req(conn)
            return
        try:
            data = conn.sock.recv(_MAX_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._wait_for_data(conn)
            return
        except OSError:
            data = b""
        refusal = self.shedder.answer(data, conn.client) if data else None
        if refusal is None:
            super().enqueue_req(conn)
        else:
            self._refuse(conn, len(data), refusal)

    def _wait_for_data(self, conn: TConn) -> None:
        """In gunicorn's own way, which it uses for connections that are silent for long."""
        conn.sock.setblocking(False)
        conn.timeout = time.monotonic() + self.cfg.keepalive
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def _refuse(self, conn: TConn, num_bytes: int, refusal: Refusal) -> None:
        keeps_alive = refusal.keeps_alive and self.alive
        try:
            conn.sock.recv(num_bytes)
            if conn.sock.send(refusal.content, socket.MSG_DONTWAIT) < len(refusal.content):
                keeps_alive = False  # its client reads nothing
        except OSError:
            keeps_alive = False
        if not keeps_alive:
            self.nr_conns -= 1
            conn.close()
            return
        conn.sock.setblocking(False)
        conn.set_timeout()
        self.keepalived_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self.on_client_socket_readable, conn))


def _lend_socket(app: Any, environ: dict[str, Any], start_response: Any) -> Any:
    environ["nanogpt.stream_socket"] = environ["gunicorn.socket"]
    return app(environ, start_response)


def _has_read_ahead(conn: TConn) -> bool:
    """Whether bytes of its next request have left the socket already."""
    return conn.parser is not None and bool(conn.parser.unreader.buf.getvalue())
