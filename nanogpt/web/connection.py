"""Whether the client is still there, asked between two waits for the engine.

A closed connection shows as POLLRDHUP, also when the client has sent its next request ahead (which makes the socket
readable but closes nothing). A client that shuts down only its sending half counts as gone, as with nginx.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

_HUNG_UP: int = getattr(select, "POLLRDHUP", 0)


def make_client_gone(environ: Mapping[str, Any]) -> Callable[[], bool]:
    """A test of the request's connection that never blocks. Under a server that neither is gunicorn nor says it
    (``nanogpt.client_gone``), the client is there."""
    if (told := environ.get("nanogpt.client_gone")) is not None:
        return cast("Callable[[], bool]", told)
    sock = environ.get("gunicorn.socket")
    if sock is None:
        return lambda: False
    if not _HUNG_UP:
        return lambda: _at_end(sock)
    poller = select.poll()
    poller.register(sock, _HUNG_UP)  # POLLHUP and POLLERR are always reported
    return lambda: bool(poller.poll(0))


def stream_socket(environ: Mapping[str, Any]) -> socket.socket | None:
    """Where the chunks of an answer may be written to by another thread than the request's, without ever waiting: only
    under our own worker (which says so), to clients that take chunks."""
    sock: socket.socket | None = environ.get("nanogpt.stream_socket")
    if sock is None or environ.get("SERVER_PROTOCOL") != "HTTP/1.1" or not sock.gettimeout():
        return None
    return sock


def _at_end(sock: socket.socket) -> bool:
    """For systems without POLLRDHUP: misses a client that sent its next request ahead and left."""
    try:
        return bool(select.select([sock], [], [], 0)[0]) and sock.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True
