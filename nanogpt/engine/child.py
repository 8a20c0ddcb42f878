"""One engine process as its supervisor holds it: the pipe that keeps it alive, and the pipe on which it reports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from nanogpt.engine.history import Entry

# Where memory runs out, the kernel kills what has the highest number: an engine that does not serve, not the one that
# does.
_EXPENDABLE = 500


class EngineChild:
    """A started engine process. ``status_fd`` becomes readable when it reports; ``poll`` says whether it has ended.

    ``entry`` is the model that it loads. ``retire_at`` and ``kill_at`` are set by the supervisor (monotonic).

    Raises: OSError when no process can be started.
    """

    def __init__(
        self,
        argv: list[str],
        settings: dict[str, Any],
        socket_path: Path,
        entry: Entry,
        *,
        loss_gate: dict[str, Any] | None = None,
    ) -> None:
        self.socket_path = socket_path
        self.entry = entry
        self.ready = False
        self.has_hung_up = False
        self.retire_at: float | None = None
        self.kill_at: float | None = None
        self.error: dict[str, Any] | None = None
        """What it failed with, as ``wire.read_error`` takes it; None when it did not come to say so."""
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
        started = {"settings": settings, "socket": str(socket_path), "status_fd": theirs, "loss_gate": loss_gate}
        # Smaller than a pipe holds (the text of a gate is limited for this): nobody waits for an engine to read.
        line = json.dumps(started, ensure_ascii=False) + "\n"
        try:
            self._stdin.write(line.encode("utf-8", "surrogateescape"))
            self._stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already; poll will say so

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        """Drain within the drain timeout, and end."""
        self._process.terminate()

    def retire(self) -> None:
        """Finish what runs, however long it takes, and end. One that is not ready has nothing to finish."""
        self._process.send_signal(signal.SIGUSR1 if self.ready else signal.SIGTERM)

    def kill(self, reason: str = "") -> None:
        self._failure = self._failure or reason
        self._process.kill()

    def set_expendable(self, expendable: bool) -> None:
        """Whether the kernel should rather kill this one when memory runs out (Linux; elsewhere nothing happens)."""
        with contextlib.suppress(OSError, ValueError):
            own = int(Path("/proc/self/oom_score_adj").read_text())
            score = min(1000, own + _EXPENDABLE) if expendable else own
            Path(f"/proc/{self.pid}/oom_score_adj").write_text(str(score))

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
                self._failure, self.error = report["reason"], report.get("error")
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
