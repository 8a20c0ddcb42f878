"""A real server process on a free loopback port, and how its tests talk to it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from nanogpt.engine.client import EngineClient
from nanogpt.settings import Settings

BIN = Path(sys.executable).parent
MARK = "NANOTEST_SERVER"
# Loaded machines are slow to start things; only a test that fails ever waits so long.
START_S = 60.0


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {timeout_s} s: {what}"
        time.sleep(0.02)
    return value


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_the_tests() -> None:
    """In the child: no server outlives tests that are killed themselves. The arbiter's death ends all the others."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Server:
    """One server: its processes (found by a mark in their environment), its log, its address, its engine."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], cwd: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.run_dir = folder / "run"
        self.log_path = folder / "log"
        keep = {
            k: v for k, v in os.environ.items() if not k.startswith(("NANOGPT_", "API_KEY", "MODEL_CH", "REDIS_URL"))
        }
        self.environment = {
            **keep,
            "OMP_NUM_THREADS": "1",
            "HOST": "127.0.0.1",
            "PORT": "0",
            "NANOGPT_RUN_DIR": str(self.run_dir),
            "PYTHONUNBUFFERED": "1",
            "RATE_LIMIT": "off",
            MARK: self.mark,
            **environment,
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_die_with_the_tests,
            )  # fmt: skip
        self.url = ""

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def wait_listening(self) -> None:
        def address() -> str | None:
            assert self.process.poll() is None, f"the server ended: {self.log}"
            found = re.search(r"Listening at: (http://127\.0\.0\.1:\d+)", self.log)
            return found and found[1]

        self.url = wait_for(address, START_S, "the server listens")

    def wait_ready(self) -> None:
        self.wait_listening()
        wait_for(lambda: self.get("/ready").status_code == 200, START_S, f"the server is ready: {self.log}")

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=30, **kwargs)

    def generate(self, body: Any, **kwargs: Any) -> requests.Response:
        return requests.post(self.url + "/generate", json=body, timeout=60, **kwargs)

    def pids(self) -> dict[int, str]:
        """Every living process of this server, with its command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        if command:  # a zombie has none
                            found[int(entry.name)] = command
                except OSError:
                    continue
        return found

    def pid_of(self, module: str) -> int:
        return next(pid for pid, command in self.pids().items() if module in command)

    def worker_pids(self) -> list[int]:
        return [
            pid for pid, command in self.pids().items() if pid != self.process.pid and "nanogpt.engine" not in command
        ]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_exit(self, timeout_s: float = 30.0) -> int:
        return self.process.wait(timeout_s)

    def wait_gone(self, timeout_s: float) -> None:
        self.process.poll()
        wait_for(lambda: not self.pids(), timeout_s, f"no process survives: {self.pids()}")

    def end(self) -> None:
        """SIGTERM, then no mercy; nothing may be left."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.wait_exit()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        try:
            self.wait_gone(10.0)
        finally:
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)
            print(self.log)  # shown when the test failed

    @contextmanager
    def engine(self) -> Iterator[EngineClient]:
        """A client of this server's engine beside its workers: it sees how many sequences run."""
        client = EngineClient(Settings(run_dir=str(self.run_dir)))
        try:
            assert client.wait_ready(START_S).state == "ready"
            yield client
        finally:
            client.close()


@contextmanager
def running(command: list[str], folder: Path, environment: dict[str, str], cwd: Path) -> Iterator[Server]:
    """A server that is ready, and has ended with all its processes afterwards."""
    server = Server(command, folder, environment, cwd)
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


TWO_WORKERS = ("gunicorn", "-w", "2", "-b", "127.0.0.1:0", "web.serve:app")
GUNICORN = ("gunicorn", "-b", "127.0.0.1:0", "web.serve:app")
ENDLESS = {"NANOGPT_CONTEXT_OVERFLOW": "crop", "NANOGPT_MAX_NEW_TOKENS": "10000000"}
"""Environment of a server whose texts go on until somebody ends them; ask with ENDLESS_BODY."""
ENDLESS_BODY = {"prompt": "To be", "max_length": 10_000_000, "seed": 1, "cache": False}


def read_events(answer: requests.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """(event name, data) of each server-sent event, as they come."""
    name = "message"
    for line in answer.iter_lines(chunk_size=1, delimiter=b"\n"):
        if line.startswith(b"event: "):
            name = line[7:].decode()
        elif line.startswith(b"data: "):
            yield name, json.loads(line[6:])
            name = "message"


def stream(server: Server, body: dict[str, Any], **kwargs: Any) -> requests.Response:
    return server.generate({**body, "stream": True}, stream=True, **kwargs)


def from_address(address: str) -> requests.Session:
    """Requests that come from another address of the loopback network."""

    class From(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, source_address=(address, 0), **kwargs)

    session = requests.Session()
    session.mount("http://", From())
    return session
