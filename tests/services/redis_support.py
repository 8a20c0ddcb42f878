"""A real redis-server of the tests' own: on a free loopback port, nothing on the disk, ended by its pid."""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
import time

from support import require_service

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class RedisServer:
    def __init__(self, *options: str) -> None:
        require_service("redis-server", shutil.which("redis-server") is not None, "apt-get install redis-server")
        self._options = options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """At the same port as before."""
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self._options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip
        until = time.monotonic() + 30.0
        while not self._listens():
            assert self.process.poll() is None, "redis-server ended"
            assert time.monotonic() < until, "redis-server does not listen"
            time.sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """SIGSTOP: it is there, takes connections, and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
