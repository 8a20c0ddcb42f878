"""The supervisor process: ``python -m nanogpt.engine.supervisor``. It owns the engines' lives, and the host's
counters (``ledger``); nothing else.

Light on purpose (no NumPy, no Flask), so that it outlives whatever kills an engine. One thread, one ``select``:

- Its ``Engines`` start engine processes, start them again when they die, change the model, and end them. With the
  setting ``compare_checkpoint`` there are two of them, for two models that live and change apart from each other.
- It lives as long as one of its *owners* does (the HTTP server's arbiter, or whoever started it), however they die.
- Whoever connects to ``control.sock`` is told the state, now and at every change: one JSON object a line with
  ``state`` (``loading``, ``ready``, ``draining``, ``unhealthy``), ``reason``, ``restarts`` and ``engine``, the path of
  the current engine's socket while it is ready. ``compare`` holds the same for the second model; null without one.
- A client may send commands, one JSON object a line: ``{"owner": pid}``, or one with an id, which gets one reply:

      {"id": 7, "command": "reload", "checkpoint": …, "who": …, "loss_gate": {"text": …, "max_loss": …} or null}
      {"id": 8, "command": "rollback"}     {"id": 9, "command": "models"}
      {"id": 10, "command": "reload", "role": "compare", …}        (of the second model; without a role: of the first)
      {"reply": 7, "model": {…}, …}        {"reply": 8, "error": {…}}

Started by ``launch.py`` with one line of JSON on standard input; answers ``{"pid": …}`` on standard output once it
listens. SIGTERM drains the engines, then ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from nanogpt import logs
from nanogpt.engine.engines import Engines
from nanogpt.engine.follow import Follower
from nanogpt.engine.history import Role
from nanogpt.engine.ledger import Ledger
from nanogpt.engine.owners import Owners, is_alive

logger = logging.getLogger("nanogpt.engine")

_MAX_UNREAD_BYTES = 1 << 20
_MAX_UNSENT_BYTES = 16 << 20


class Supervisor:
    """The engines, and those who want to know how they are or have the model changed."""

    def __init__(self, run_dir: Path, settings: dict[str, Any], engine_argv: list[str]) -> None:
        self._run_dir = run_dir
        self._selector = selectors.DefaultSelector()
        self._clients: dict[socket.socket, bytearray] = {}  # what each has sent and is not a whole line yet
        self._unsent: dict[socket.socket, bytearray] = {}
        self._must_drain = False
        self.owners = Owners(self._selector)
        self.engines = Engines(self._selector, run_dir, settings, engine_argv, self._tell_all)
        self.roles: dict[Role, Engines] = {"main": self.engines}
        if settings["compare_checkpoint"]:
            # Nobody rolls back what is only compared with: a former one need not stay in memory.
            others = {**settings, "model_checkpoint": settings["compare_checkpoint"], "standby": False}
            self.roles["compare"] = Engines(self._selector, run_dir, others, engine_argv, self._tell_all, "compare")
        self._follower = Follower(self.engines, settings) if settings["follow"] else None
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
        if self._follower is not None:
            self._follower.begin()
        for engines in self.roles.values():
            engines.start()
        try:
            while True:
                self._take_in()
                for engines in self.roles.values():
                    if self._must_drain:
                        engines.drain()
                    engines.tick()
                if self.owners.all_gone():
                    logger.info("The server that this engine belongs to is gone: the engine ends.")
                    return
                if self.engines.state == "draining" and all(engines.all_ended for engines in self.roles.values()):
                    return
                if self._follower is not None:
                    self._follower.tick()
        finally:
            self._close()

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._must_drain = True

    def _take_in(self) -> None:
        times = [engines.next_at() for engines in self.roles.values()]
        times.append(self._follower.next_at if self._follower is not None else None)
        until = min((at for at in times if at is not None), default=None)
        timeout = max(0.0, until - time.monotonic()) if until is not None else None
        if self.owners.must_poll:
            timeout = min(1.0, timeout if timeout is not None else 1.0)
        for key, mask in self._selector.select(timeout):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake_in:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(4096)
            elif key.data is self.owners:
                self.owners.on_readable(key.fd)
            elif isinstance(key.data, Engines):
                key.data.on_readable(key.fd)
            elif key.data is self.ledger:
                self.ledger.on_readable(key.fileobj)
            elif isinstance(key.fileobj, socket.socket):
                if mask & selectors.EVENT_WRITE:
                    self._tell(key.fileobj, b"")
                if mask & selectors.EVENT_READ:
                    self._read(key.fileobj)

    # -- clients ---------------------------------------------------------------------------------------------------

    def _tell_all(self) -> None:
        line = self._state_line()
        for client in list(self._clients):
            self._tell(client, line)

    def _state_line(self) -> bytes:
        other = self.roles.get("compare")
        state = {**self.engines.describe(), "compare": other and other.describe(), "pid": os.getpid()}
        return json.dumps(state).encode() + b"\n"

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        self._clients[client], self._unsent[client] = bytearray(), bytearray()
        self._selector.register(client, selectors.EVENT_READ)
        self._tell(client, self._state_line())

    def _tell(self, client: socket.socket, line: bytes) -> None:
        """Send now what goes, and keep the rest; a client that has stopped reading is dropped."""
        unsent = self._unsent[client]
        unsent += line
        try:
            del unsent[: client.send(unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(unsent) > _MAX_UNSENT_BYTES:
            self._drop(client)
        else:
            self._selector.modify(client, selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0))

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
                self._command(client, json.loads(line))
        except (ValueError, TypeError, KeyError):
            self._drop(client)

    def _command(self, client: socket.socket, command: dict[str, Any]) -> None:
        """Raises: ValueError, TypeError or KeyError for what is no command."""
        if "owner" in command:
            self.owners.add(int(command["owner"]))
            return
        number, name, engines = int(command["id"]), command["command"], self.roles[command.get("role", "main")]

        def done(result: dict[str, Any]) -> None:
            if client in self._clients:  # it may have left meanwhile; what it asked for goes on
                self._tell(client, json.dumps({"reply": number, **result}).encode() + b"\n")

        if name == "reload":
            engines.reload(str(command["checkpoint"]), str(command["who"]), command.get("loss_gate"), done)
        elif name == "rollback":
            engines.rollback(done)
        elif name == "models":
            entries = [entry for each in self.roles.values() for entry in each.history.to_list()]
            done({"models": sorted(entries, key=lambda entry: str(entry["at"]))})
        else:
            raise ValueError(f"the command {name!r}")

    def _drop(self, client: socket.socket) -> None:
        if self._clients.pop(client, None) is not None:
            del self._unsent[client]
            self._selector.unregister(client)
            client.close()

    def _close(self) -> None:
        for engines in self.roles.values():
            engines.close()
        for client in list(self._clients):
            self._drop(client)
        self.owners.close()
        self.ledger.close()
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for end in (self._listener, self._wake_in, self._wake_out):
            end.close()
        remove_sockets(self._run_dir)


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
        _remove(run_dir, everything=not is_alive(started["owner_pid"]))
    return 0


def _remove(run_dir: Path, *, everything: bool) -> None:
    """Folders in it are the HTTP workers', who may live on and find another supervisor: they go with their server.

    Not in the middle of somebody's start: that one finds this supervisor's lock taken, and tries again."""
    fd = os.open(run_dir / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):
        for path in run_dir.iterdir():
            if not path.is_dir():
                path.unlink()
            elif everything:
                shutil.rmtree(path)
        run_dir.rmdir()


if __name__ == "__main__":
    sys.exit(main())
