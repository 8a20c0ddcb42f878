"""One engine process as its supervisor holds it: the pipe that keeps it alive, and the pipe on which it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any


class EngineChild:
    """A started engine process. ``status_fd`` becomes readable when it reports; ``poll`` says whether it has ended.

    Raises: OSError when no process can be started.
    """

    def __init__(self, argv: list[str], settings: dict[str, Any], socket_path: Path) -> None:
        self.socket_path = socket_path
        self.ready = False
        self.has_hung_up = False
        self.status_fd, theirs = os.pipe()
        os.set_blocking(self.status_fd, False)
        self._unread = b""
        self._failure = ""
        try:
            # Its standard input stays open while this process lives: its end is the engine's end.
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=(theirs,))
        except OSError:
            os.close(self.status_fd)
            raise
        finally:
            os.close(theirs)
        self.pid = self._process.pid
        line = json.dumps({"settings": settings, "socket": str(socket_path), "status_fd": theirs}) + "\n"
        try:
            self._stdin.write(line.encode())
            self._stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already; poll will say so

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def read_status(self) -> list[dict[str, Any]]:
        """What it reported since the last time."""
        while True:
            try:
                data = os.read(self.status_fd, 65536)
            except BlockingIOError:
                break
            if not data:
                self.has_hung_up = True
                break
            self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        reports: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for report in reports:
            if report["state"] == "failed":
                self._failure = report["reason"]
        return reports

    def close(self) -> None:
        """Reap the ended process, close the pipes, remove its socket."""
        self._process.wait()
        try:
            self._stdin.close()
        except BrokenPipeError:
            pass
        os.close(self.status_fd)
        self.socket_path.unlink(missing_ok=True)

    @property
    def reason(self) -> str:
        """Why it has ended, in one sentence: its own words, or what the system says."""
        if self._failure:
            return self._failure
        code = self._process.returncode
        if code < 0:
            return f"The engine was killed by {signal.Signals(-code).name}."
        return f"The engine ended with exit code {code}."
