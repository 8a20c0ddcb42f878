"""The engine process's loop: sockets in, engine steps, sockets out. One thread does all of it, so nothing is locked.

Between two steps the loop takes in what arrived (new requests, aborts, closed connections), and after each step it
sends every connection one message with all that happened to its requests. While there is nothing to compute it sleeps
in ``select``. A connection that is not read is dropped: it must not stop the others.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from nanogpt.engine import wire
from nanogpt.engine.core import Engine
from nanogpt.engine.messages import Tokens
from nanogpt.engine.sequence import Event
from nanogpt.errors import InvalidRequest, NanoGPTError

logger = logging.getLogger("nanogpt.engine")

# What a connection may leave unread before it is dropped: minutes of tokens. No less than a frame: prompts that end
# together with their log probabilities (20 alternatives a token: 300 KB a prompt) fill a good part of one.
MAX_UNREAD_BYTES = wire.MAX_FRAME_BYTES
STATS_INTERVAL_S = 0.25
_READ_BYTES = 1 << 18
_LAST_WORDS_S = 1.0


class Connection:
    """One HTTP worker: the requests it has in the engine, and the bytes under way in both directions."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.frames = wire.Frames()
        self.unsent = bytearray()
        self.handles: dict[int, int] = {}
        self.closed = False
        self._accepted: list[int] = []
        self._refused: list[Any] = []
        self._tokens: list[Any] = []
        self._finished: list[Any] = []

    def accept(self, request_number: int) -> None:
        self._accepted.append(request_number)

    def refuse(self, request_number: int, error: NanoGPTError) -> None:
        self._refused.append([request_number, wire.error_to_wire(error)])

    def on_event(self, request_number: int, event: Event) -> None:
        """The sink of this connection's requests."""
        if isinstance(event, Tokens):
            self._tokens += (request_number, event.token_ids, wire.logprobs_to_wire(event.logprobs))
        else:
            del self.handles[request_number]
            self._finished.append([request_number, wire.finished_to_wire(event)])

    def take_news(self) -> bytes | None:
        """All that happened since the last time, as one frame."""
        if not (self._tokens or self._finished or self._accepted or self._refused):
            return None
        frame = wire.pack([wire.NEWS, self._accepted, self._refused, self._tokens, self._finished])
        self._accepted, self._refused, self._tokens, self._finished = [], [], [], []
        return frame


class EngineServer:
    """Serves one engine on one listening Unix socket until it is told to stop."""

    def __init__(
        self, engine: Engine, listener: socket.socket, *, hello: dict[str, Any], drain_timeout_s: float
    ) -> None:
        self._engine = engine
        self._listener = listener
        self._hello = wire.pack([wire.HELLO, {"version": wire.VERSION, **hello}])
        self._drain_timeout_s = drain_timeout_s
        self._drain_until: float | None = None
        self._connections: dict[socket.socket, Connection] = {}
        self._selector = selectors.DefaultSelector()
        self._handles_signals = False
        self._stats_due = 0.0
        self._stats_changed = False
        self._stats_sent: dict[str, Any] = {}
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ)

    def install_signal_handlers(self) -> None:
        """SIGTERM and SIGINT drain: what was accepted is finished, the rest is refused."""
        self._handles_signals = True
        signal.set_wakeup_fd(self._wake_out.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.drain())

    def drain(self) -> None:
        """Refuse new requests, finish the running ones, then let ``run`` return. May be called by any thread."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._drain_timeout_s
        self._engine.draining = True
        with contextlib.suppress(OSError):
            self._wake_out.send(b"!")

    def run(self) -> None:
        """Serve until drained. Raises: EngineDied when the runner is lost; everybody was told."""
        try:
            while True:
                busy = self._engine.has_work()
                now = time.monotonic()
                if now >= self._stats_due:
                    self._send_stats(now)
                if self._drain_until is not None and self._is_drained(busy, now):
                    return
                self._take_in(0.0 if busy else self._sleep_s(now))
                # Whoever was accepted or refused knows it before the step is computed.
                self._send_news()
                try:
                    stepped = self._engine.step()
                finally:
                    self._send_news()
                self._stats_changed = self._stats_changed or stepped
        finally:
            self._close()

    def _is_drained(self, busy: bool, now: float) -> bool:
        if self._drain_until is not None and now >= self._drain_until:
            self._abort_all()
            return True
        return not busy and not any(connection.unsent for connection in self._connections.values())

    def _sleep_s(self, now: float) -> float | None:
        """How long there is nothing to do but to wait for news; None is for ever."""
        until = [self._drain_until] if self._drain_until is not None else []
        if self._stats_changed:
            until.append(self._stats_due)
        return max(0.0, min(until) - now) if until else None

    # -- in --------------------------------------------------------------------------------------------------------

    def _take_in(self, timeout: float | None) -> None:
        for key, mask in self._selector.select(timeout):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake_in:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            else:
                connection: Connection = key.data
                if mask & selectors.EVENT_WRITE:
                    self._send(connection, b"")
                if mask & selectors.EVENT_READ and not connection.closed:
                    self._read(connection)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # gone again before it was accepted
        sock.setblocking(False)
        connection = Connection(sock)
        self._connections[sock] = connection
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self._send(connection, self._hello)
        self._send(connection, wire.pack([wire.STATS, asdict(self._engine.stats())]))

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return
        connection.frames.feed(data)
        try:
            for message in connection.frames:
                self._handle(connection, message)
        except (ValueError, TypeError, IndexError) as error:
            logger.error("A worker's connection is closed: it sent %s.", error)
            self._drop(connection)

    def _handle(self, connection: Connection, message: list[Any]) -> None:
        kind, request_number = message[0], message[1]
        if kind == wire.ABORT:
            handle = connection.handles.get(request_number)
            if handle is not None:
                self._engine.abort(handle)
        elif kind == wire.SUBMIT:
            if request_number in connection.handles:
                raise ValueError(f"request number {request_number} twice")
            try:
                request = wire.read_request(message[2:])
                handle = self._engine.submit(request, partial(connection.on_event, request_number))
            except NanoGPTError as error:
                connection.refuse(request_number, error)
            except TypeError as error:
                connection.refuse(request_number, InvalidRequest(f"The request cannot be read: {error}."))
            else:
                connection.handles[request_number] = handle
                connection.accept(request_number)
        else:
            raise ValueError(f"message kind {kind!r}")

    # -- out -------------------------------------------------------------------------------------------------------

    def _send_news(self) -> None:
        for connection in list(self._connections.values()):
            frame = connection.take_news()
            if frame is not None:
                self._send(connection, frame)

    def _send_stats(self, now: float) -> None:
        self._stats_due = now + STATS_INTERVAL_S
        self._stats_changed = False
        stats = asdict(self._engine.stats())
        if stats != self._stats_sent:
            self._stats_sent = stats
            frame = wire.pack([wire.STATS, stats])
            for connection in list(self._connections.values()):
                self._send(connection, frame)

    def _send(self, connection: Connection, frame: bytes) -> None:
        """Send now what goes, keep the rest for when the socket is writable."""
        was_waiting = bool(connection.unsent)
        data: bytes | bytearray = frame
        if was_waiting:
            connection.unsent += frame
            data = connection.unsent
        try:
            num_sent = connection.socket.send(data) if data else 0
        except BlockingIOError:
            num_sent = 0
        except OSError:
            self._drop(connection)
            return
        if was_waiting:
            del connection.unsent[:num_sent]
        elif num_sent < len(frame):
            connection.unsent += frame[num_sent:]
        if len(connection.unsent) > MAX_UNREAD_BYTES:
            logger.error("A worker's connection is closed: it left %d bytes unread.", len(connection.unsent))
            self._drop(connection)
        elif bool(connection.unsent) != was_waiting:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
            self._selector.modify(connection.socket, events, connection)

    # -- endings -----------------------------------------------------------------------------------------------

    def _drop(self, connection: Connection) -> None:
        """The worker is gone: so is the interest in its requests."""
        if connection.closed:
            return
        connection.closed = True
        del self._connections[connection.socket]
        self._selector.unregister(connection.socket)
        connection.socket.close()
        for handle in list(connection.handles.values()):
            self._engine.abort(handle)

    def _abort_all(self) -> None:
        """The time to drain is over: everybody ends with what they have."""
        for connection in list(self._connections.values()):
            for handle in list(connection.handles.values()):
                self._engine.abort(handle)
            frame = connection.take_news()
            with contextlib.suppress(OSError):
                connection.socket.settimeout(_LAST_WORDS_S)
                connection.socket.sendall(bytes(connection.unsent) + (frame or b""))

    def _close(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()
        if self._handles_signals:
            signal.set_wakeup_fd(-1)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
