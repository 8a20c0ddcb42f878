"""The host's counters: in the supervisor's process, asked by all HTTP workers, and so exact over them.

The supervisor outlives engines and workers, and answers at once, where an engine would answer between two steps. What
is counted lives as long as the supervisor does: as long as the server.

``Ledger`` is the supervisor's side: registered at its selector, with itself as the key's data. ``LedgerClient`` is a
worker's side: one connection, shared by its threads. Messages are frames of ``wire``:

    worker → ledger   [TAKE, client, rules, amount, hold, hold_s]     answered by [admitted, states]
                      [SETTLE, client, rules, hold, used]             not answered

What a connection holds when it closes counts as used: its worker has died, or has given the connection up.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanogpt.engine import wire
from nanogpt.engine.launch import connect
from nanogpt.engine.windows import Rule, State, Taken, Windows
from nanogpt.errors import ServiceUnavailable

SOCKET = "limits.sock"
TAKE, SETTLE = range(2)
_READ_BYTES = 65536
# A supervisor that is connected answers within a millisecond; past this it hangs.
_ANSWER_S = 1.0
# One that is being started listens after some tenths of a second.
_START_S = 3.0
_ALL = 2**62


class Ledger:
    """The supervisor's side. One thread: the supervisor's."""

    def __init__(self, selector: selectors.BaseSelector, run_dir: Path) -> None:
        self._selector = selector
        self.windows = Windows()
        self._connections: dict[socket.socket, _Connection] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(run_dir / SOCKET))
        self._listener.listen(256)
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self)

    def on_readable(self, sock: Any) -> None:
        """The listener or a connection has something."""
        if sock is self._listener:
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._connections[connection] = _Connection()
                self._selector.register(connection, selectors.EVENT_READ, self)
        elif sock in self._connections:
            self._read(sock)

    def close(self) -> None:
        for sock in list(self._connections):
            self._drop(sock)
        self._selector.unregister(self._listener)
        self._listener.close()

    def _read(self, sock: socket.socket) -> None:
        connection = self._connections[sock]
        try:
            data = sock.recv(_READ_BYTES)
            if not data:
                raise ConnectionResetError
            connection.frames.feed(data)
            for kind, *fields in connection.frames:
                if kind == TAKE:
                    answer = wire.pack(self._take(connection, *fields))
                    if sock.send(answer) < len(answer):
                        raise ConnectionResetError  # somebody who does not read: answers are short
                elif kind == SETTLE:
                    self._settle(connection, *fields)
        except BlockingIOError:
            pass
        except (OSError, ValueError, TypeError):
            self._drop(sock)

    def _take(
        self, connection: _Connection, client: str, rules: list[Any], amount: int, hold: str, hold_s: float
    ) -> list[Any]:
        known = [Rule(*rule) for rule in rules]
        taken = self.windows.take(client, known, amount, hold=hold, hold_s=hold_s)
        if hold and taken.admitted:
            connection.holds[hold] = (client, known)
        return [taken.admitted, taken.states]

    def _settle(self, connection: _Connection, client: str, rules: list[Any], hold: str, used: int) -> None:
        connection.holds.pop(hold, None)
        self.windows.settle(client, [Rule(*rule) for rule in rules], hold, used)

    def _drop(self, sock: socket.socket) -> None:
        connection = self._connections.pop(sock)
        self._selector.unregister(sock)
        sock.close()
        for hold, (client, rules) in connection.holds.items():
            self.windows.settle(client, rules, hold, _ALL)


class _Connection:
    """What has arrived from a worker, and what it holds."""

    def __init__(self) -> None:
        self.frames = wire.Frames()
        self.holds: dict[str, tuple[str, list[Rule]]] = {}


class LedgerClient:
    """The worker's side: Counters that ask the ledger. Safe to share between threads, and to be carried over a fork."""

    def __init__(self, run_dir: Callable[[], Path], wake: Callable[[], object]) -> None:
        """``wake`` is called where nobody listens: it has the supervisor started, and does not wait for it."""
        self._run_dir = run_dir
        self._wake = wake
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._frames = wire.Frames()
        self._pid = 0

    def take(
        self, client: str, rules: Sequence[Rule], amount: int = 1, *, hold: str = "", hold_s: float = 0.0
    ) -> Taken:
        """Raises: ServiceUnavailable when the ledger does not answer. Then there is no engine that could, either."""
        message = [TAKE, client, _to_wire(rules), amount, hold, hold_s]
        until = time.monotonic() + _START_S
        with self._locked():
            while (answer := self._ask(message)) is None:
                if time.monotonic() >= until:
                    raise _unreachable()
        admitted, states = answer
        return Taken(admitted, [State(*state) for state in states])

    def settle(self, client: str, rules: Sequence[Rule], hold: str, used: int) -> None:
        """Never raises: a ledger that is gone has forgotten the hold, and one that hangs lets it lapse."""
        with contextlib.suppress(OSError, ServiceUnavailable), self._locked():
            if self._sock is not None and self._pid == os.getpid():
                self._sock.sendall(wire.pack([SETTLE, client, _to_wire(rules), hold, used]))

    def close(self) -> None:
        with self._lock:
            self._hang_up()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Many threads wait no longer for a ledger that hangs than one does."""
        if not self._lock.acquire(timeout=_START_S + _ANSWER_S):
            raise _unreachable()
        try:
            yield
        finally:
            self._lock.release()

    def _ask(self, message: list[Any]) -> list[Any] | None:
        """The answer; None where nobody listens, or has just ended: perhaps the next supervisor listens soon."""
        try:
            sock = self._connected()
            sock.sendall(wire.pack(message))
            while True:
                data = sock.recv(_READ_BYTES)
                if not data:
                    raise ConnectionResetError
                self._frames.feed(data)
                for answer in self._frames:
                    return answer
        except TimeoutError:
            self._hang_up()
            raise _unreachable() from None
        except (OSError, ValueError):
            self._hang_up()
            return None

    def _connected(self) -> socket.socket:
        if self._pid != os.getpid():
            self._hang_up()
        if self._sock is None:
            try:
                self._sock = connect(self._run_dir() / SOCKET)
            except OSError:
                self._wake()
                time.sleep(0.02)
                raise
            self._sock.settimeout(_ANSWER_S)
            self._frames, self._pid = wire.Frames(), os.getpid()
        return self._sock

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _to_wire(rules: Sequence[Rule]) -> list[list[Any]]:
    return [[rule.kind, rule.limit, rule.period_s] for rule in rules]


def _unreachable() -> ServiceUnavailable:
    return ServiceUnavailable("The request could not be counted against its limit.", remedy="Send it again.")
