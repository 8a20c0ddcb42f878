"""The server under load: its processes by what they are, what they hold, and the faults that are done to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
WAIT_S = 60.0


@dataclass(frozen=True)
class Held:
    """What processes hold. Units: bytes of private memory (USS), open file descriptors."""

    processes: int
    memory_bytes: int
    descriptors: int


class Server:
    """gunicorn with this product, on a free port. Ends with ``stop``."""

    def __init__(self, port: int, workers: int, environment: dict[str, str], log: Path) -> None:
        self.port = port
        self.log = log
        command = [sys.executable, "-m", "gunicorn", "-w", str(workers), "-b", f"127.0.0.1:{port}", "web.serve:app"]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, cwd=_ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        wait_for(lambda: self.status("/ready") == 200, f"the server is ready (see {self.log})", self._process.poll)

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def processes(self) -> dict[int, str]:
        """Every process of the server: pid to what it is (arbiter, worker, supervisor, engine)."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except (OSError, IndexError):
                    continue
        found = {self._process.pid: "arbiter"}
        grown = True
        while grown:
            grown = False
            for pid, parent in parents.items():
                if parent in found and pid not in found:
                    role = _role(pid)
                    if role:
                        found[pid] = role
                        grown = True
        return found

    def pids(self, role: str) -> list[int]:
        return sorted(pid for pid, is_role in self.processes().items() if is_role == role)

    def held(self) -> dict[str, Held]:
        """What each role holds, all its processes together."""
        result: dict[str, Held] = {}
        for pid, role in self.processes().items():
            before, more = result.get(role, Held(0, 0, 0)), _held(pid)
            result[role] = Held(
                before.processes + more.processes,
                before.memory_bytes + more.memory_bytes,
                before.descriptors + more.descriptors,
            )
        return result

    def kill(self, role: str) -> int:
        """SIGKILL one process of the role. Returns its pid."""
        pid = self.pids(role)[-1]
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self) -> int:
        """SIGTERM; the exit code, once every process has ended."""
        pids = self.processes()
        self._process.terminate()
        try:
            code = self._process.wait(90)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "no process of the server is left")
        return code


def wait_for(condition: Callable[[], object], what: str, ended: Callable[[], object] = lambda: None) -> None:
    """Raises: TimeoutError, or RuntimeError when ``ended`` says that there is nothing to wait for any more."""
    until = time.monotonic() + WAIT_S
    while not condition():
        if ended() is not None:
            raise RuntimeError(f"ended before {what}")
        if time.monotonic() > until:
            raise TimeoutError(f"after {WAIT_S:g} s still not: {what}")
        time.sleep(0.05)


def _role(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
    if not command:
        return ""  # a zombie
    for module, role in (("nanogpt.engine.supervisor", "supervisor"), ("nanogpt.engine.process", "engine")):
        if module in command:
            return role
    return "worker"


def _held(pid: int) -> Held:
    """Memory is what nobody else has: what would be free if the process ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return Held(0, 0, 0)  # it has just ended
    return Held(1, sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024, descriptors)
