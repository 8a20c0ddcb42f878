"""The supervisor process: ``python -m nanogpt.engine.supervisor``. It owns the engine's life, and the host's
counters (``ledger``); nothing else.

Light on purpose (no NumPy, no Flask), so that it outlives whatever kills an engine. One thread, one ``select``:

- It starts the engine, starts it again when it dies (at once the first time, then with a growing pause of up to 30 s),
  and kills it when it is to end.
- It lives as long as one of its *owners* does (the HTTP server's arbiter, or whoever started it), however they die.
- Whoever connects to ``control.sock`` is told the state, now and at every change: one JSON object a line with
  ``state`` (``loading``, ``ready``, ``draining``, ``unhealthy``), ``reason``, ``restarts`` and ``engine``, the path of
  the engine's socket while it is ready. A client may send commands, one JSON object a line: ``{"owner": pid}``.

Each engine gets a socket of its own (``engine-<n>.sock``), so that two can live side by side while one takes over.
Started by ``launch.py`` with one line of JSON on standard input; answers ``{"pid": …}`` on standard output once it
listens. SIGTERM drains the engine, then ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from nanogpt import logs
from nanogpt.engine.child import EngineChild
from nanogpt.engine.ledger import Ledger
from nanogpt.engine.messages import EngineState
from nanogpt.engine.owners import Owners

logger = logging.getLogger("nanogpt.engine")

MAX_PAUSE_S = 30.0
# An engine that was ready for so long starts with a clean slate when it dies.
STABLE_S = 60.0
# More deaths than this in a row, and the state is unhealthy rather than loading.
_TOLERATED_DEATHS = 2
# What an engine may need beyond its own drain timeout before it is killed.
_GRACE_S = 5.0
_MAX_UNREAD_BYTES = 1 << 20


class Supervisor:
    """One engine and those who want to know how it is."""

    def __init__(self, run_dir: Path, settings: dict[str, Any], engine_argv: list[str]) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._engine_argv = engine_argv
        self._selector = selectors.DefaultSelector()
        self._clients: dict[socket.socket, bytearray] = {}
        self._engine: EngineChild | None = None
        self._num_started = 0
        self._num_deaths = 0
        self._start_at: float | None = None
        self._ready_since: float | None = None
        self._kill_at: float | None = None
        self._must_drain = False
        self.state: EngineState = "loading"
        self.reason = ""
        self.owners = Owners(self._selector)
        self.ledger = Ledger(self._selector, run_dir)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(run_dir / "control.sock"))
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._wake_out.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_term)

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until drained, or until the last owner is gone."""
        self._start_engine()
        try:
            while True:
                self._take_in()
                if self._must_drain:
                    self._drain()
                if self._engine is not None and self._engine.poll() is not None:
                    self._on_death(self._engine)
                if self.owners.all_gone():
                    logger.info("The server that this engine belongs to is gone: the engine ends.")
                    return
                if self.state == "draining" and self._engine is None:
                    return
                now = time.monotonic()
                if self._start_at is not None and now >= self._start_at:
                    self._start_engine()
                if self._kill_at is not None and now >= self._kill_at and self._engine is not None:
                    logger.warning("The engine did not drain in time and is killed.")
                    self._engine.kill()
        finally:
            self._close()

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._must_drain = True

    def _drain(self) -> None:
        """Let the engine finish what it has, then end."""
        self._must_drain = False
        if self.state != "draining":
            self._kill_at = time.monotonic() + float(self._settings["drain_timeout_s"]) + _GRACE_S
            self._start_at = None
            self._publish("draining", "The server is shutting down.")
            if self._engine is not None:
                self._engine.terminate()

    def _take_in(self) -> None:
        times = [at for at in (self._start_at, self._kill_at) if at is not None]
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        if self.owners.must_poll:
            timeout = min(1.0, timeout if timeout is not None else 1.0)
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake_in:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            elif key.data is self.owners:
                self.owners.on_readable(key.fd)
            elif key.data is self.ledger:
                self.ledger.on_readable(key.fileobj)
            elif isinstance(key.fileobj, socket.socket):
                self._read(key.fileobj)
            elif self._engine is not None and key.fileobj == self._engine.status_fd:
                self._read_status(self._engine)

    # -- the engine ------------------------------------------------------------------------------------------------

    def _start_engine(self) -> None:
        self._start_at = None
        self._num_started += 1
        path = self._run_dir / f"engine-{self._num_started}.sock"
        try:
            self._engine = EngineChild(self._engine_argv, self._settings, path)
        except OSError as error:
            self._start_again(f"The engine process cannot be started: {error.strerror}.", was_ready=False)
            return
        self._selector.register(self._engine.status_fd, selectors.EVENT_READ)
        logger.debug("The engine starts as process %d.", self._engine.pid)
        self._publish(self.state, self.reason)

    def _read_status(self, engine: EngineChild) -> None:
        had_hung_up = engine.has_hung_up
        reports = engine.read_status()
        if engine.has_hung_up and not had_hung_up:
            self._selector.unregister(engine.status_fd)
        for status in reports:
            if status["state"] == "ready" and self.state != "draining":
                engine.ready = True
                self._ready_since = time.monotonic()
                self._publish("ready", "")
            elif status["state"] == "loading" and self.state == "loading":
                self._publish("loading", status["reason"])

    def _on_death(self, engine: EngineChild) -> None:
        """The engine has ended: say so, and set the time of the next start."""
        self._read_status(engine)
        self._let_go(engine)
        self._kill_at = None
        if self.state != "draining":
            self._start_again(engine.reason, was_ready=engine.ready)

    def _start_again(self, reason: str, *, was_ready: bool) -> None:
        now = time.monotonic()
        if self._ready_since is not None and now - self._ready_since >= STABLE_S:
            self._num_deaths = 0
        self._ready_since = None
        self._num_deaths += 1
        pause = pause_s(self._num_deaths, was_ready)
        self._start_at = now + pause
        logger.error("%s It is started again%s.", reason, f" in {pause:g} s" if pause else "")
        healthy = was_ready and self._num_deaths <= _TOLERATED_DEATHS
        self._publish("loading" if healthy else "unhealthy", reason)

    def _let_go(self, engine: EngineChild) -> None:
        if not engine.has_hung_up:
            self._selector.unregister(engine.status_fd)
        engine.close()
        self._engine = None

    # -- clients ---------------------------------------------------------------------------------------------------

    def _publish(self, state: EngineState, reason: str) -> None:
        self.state, self.reason = state, reason
        line = self._state_line()
        for client in list(self._clients):
            self._tell(client, line)

    def _state_line(self) -> bytes:
        engine = self._engine
        # While draining, those who have requests in the engine keep their connections.
        path = str(engine.socket_path) if engine is not None and engine.ready else None
        values = {
            "state": self.state,
            "reason": self.reason,
            "restarts": max(0, self._num_started - 1),
            "engine": path,
            "engine_pid": engine.pid if engine is not None else None,
            "pid": os.getpid(),
        }
        return json.dumps(values).encode() + b"\n"

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        self._clients[client] = bytearray()
        self._selector.register(client, selectors.EVENT_READ)
        self._tell(client, self._state_line())

    def _tell(self, client: socket.socket, line: bytes) -> None:
        """States are short and rare: a client whose socket is full has stopped reading, and is dropped."""
        try:
            if client.send(line) < len(line):
                self._drop(client)
        except OSError:
            self._drop(client)

    def _read(self, client: socket.socket) -> None:
        if client not in self._clients:
            return  # dropped a moment ago
        try:
            data = client.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        buffer = self._clients[client]
        buffer += data
        try:
            if not data or len(buffer) > _MAX_UNREAD_BYTES:
                raise ValueError("the end")
            *lines, rest = bytes(buffer).split(b"\n")
            buffer[:] = rest
            for line in lines:
                self._command(json.loads(line))
        except (ValueError, TypeError, KeyError):
            self._drop(client)

    def _command(self, command: dict[str, Any]) -> None:
        if "owner" in command:
            self.owners.add(int(command["owner"]))

    def _drop(self, client: socket.socket) -> None:
        if self._clients.pop(client, None) is not None:
            self._selector.unregister(client)
            client.close()

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.kill()
            self._let_go(self._engine)
        for client in list(self._clients):
            self._drop(client)
        self.owners.close()
        self.ledger.close()
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for end in (self._listener, self._wake_in, self._wake_out):
            end.close()
        remove_sockets(self._run_dir)


def pause_s(num_deaths: int, was_ready: bool) -> float:
    """How long to wait before the next start, after so many deaths in a row: 0 1 2 4 … seconds.

    One that was never ready is not started at once: the same would happen again.
    """
    if num_deaths == 1 and was_ready:
        return 0.0
    return min(MAX_PAUSE_S, 2.0 ** (min(num_deaths, 10) - (2 if was_ready else 1)))


def remove_sockets(run_dir: Path) -> None:
    """Sockets that a former supervisor left: nobody listens there any more."""
    for path in run_dir.glob("*.sock"):
        path.unlink(missing_ok=True)


def main() -> int:
    """The life of a supervisor process. Returns the exit code."""
    started = json.loads(sys.stdin.buffer.readline())
    settings = started["settings"]
    logs.configure(settings["log_format"], settings["log_level"])
    run_dir = Path(started["run_dir"])
    # Held for life, by this process alone: whoever can take it knows that there is no supervisor.
    try:
        lock = os.open(run_dir / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):  # another one lives, or is just removing its folder
        print(json.dumps({"busy": True}), flush=True)
        return 1
    remove_sockets(run_dir)
    supervisor = Supervisor(run_dir, settings, started["engine_argv"])
    supervisor.owners.add(started["owner_pid"])
    print(json.dumps({"pid": os.getpid()}), flush=True)
    # Whoever started this process reads no further; what an engine prints belongs into the log.
    os.dup2(2, 1)
    supervisor.run()
    if started["remove_run_dir"]:
        _remove(run_dir)
    return 0


def _remove(run_dir: Path) -> None:
    """Not in the middle of somebody's start: that one finds this supervisor's lock taken, and tries again."""
    fd = os.open(run_dir / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):
        for path in run_dir.iterdir():
            path.unlink()
        run_dir.rmdir()


if __name__ == "__main__":
    sys.exit(main())
