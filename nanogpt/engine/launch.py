"""Starting the supervisor: by the HTTP server's arbiter (``start_supervisor``), or, where that did not happen, by
whoever needs the engine first (``ensure_supervisor``), under a file lock, so that any number may try at once.

Runs in the HTTP server's processes. Everything the engine needs goes through pipes, and its sockets lie in a folder
that only this user can enter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nanogpt
from nanogpt.errors import EngineLoading, SettingsError
from nanogpt.settings import Settings

ENGINE_ARGV = (sys.executable, "-m", "nanogpt.engine.process")
# The kernel's limit for the path of a Unix socket is 107 bytes (103 on macOS); ours end in /compare-<n>.sock.
_MAX_RUN_DIR_BYTES = 80


@dataclass
class Handle:
    """A supervisor that this process has started."""

    run_dir: str
    process: subprocess.Popen[bytes]
    temporary: bool = False

    def stop(self, timeout_s: float) -> None:
        """Drain the engine and end it; kill what has not ended after ``timeout_s``."""
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.temporary:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self.process.pid


# What this process, or the arbiter before it forked this process, has started: workers inherit it.
_started: tuple[str, int] | None = None
# Supervisors that this process must reap when they end.
_children: list[subprocess.Popen[bytes]] = []


def start_supervisor(settings: Settings, owner_pid: int, *, engine_argv: tuple[str, ...] = ENGINE_ARGV) -> Handle:
    """Start a supervisor that lives as long as the owner; ``ensure_supervisor`` then finds it, also after a fork.

    Raises: SettingsError when the run directory cannot be used, or a server uses it already.
    """
    global _started
    temporary = not settings.run_dir
    run_dir = Path(tempfile.mkdtemp(prefix="nanogpt-") if temporary else settings.run_dir)
    try:
        with _locked(_checked(run_dir)):
            process = _spawn(run_dir, settings, owner_pid, engine_argv, temporary=temporary)
    except BaseException:
        if temporary:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    if process is None:
        raise SettingsError(
            f"Another server uses the run directory {run_dir}.", remedy="Give each server its own NANOGPT_RUN_DIR."
        )
    _started = (str(run_dir), owner_pid)
    _children.append(process)
    return Handle(str(run_dir), process, temporary)


def ensure_supervisor(settings: Settings, *, engine_argv: tuple[str, ...] = ENGINE_ARGV) -> str:
    """The run directory of this server's supervisor, which is started if there is none.

    Where no arbiter has started one, all workers of one gunicorn master share one; any other process has its own.

    Raises: SettingsError when the run directory cannot be used; EngineLoading when no supervisor comes up.
    """
    reap()
    run_dir, owner_pid = run_dir_of(settings)
    temporary = not settings.run_dir
    for _ in range(5):
        _checked(run_dir)
        try:
            with _locked(run_dir):
                if _listens(run_dir, owner_pid):
                    return str(run_dir)
                process = _spawn(run_dir, settings, owner_pid, engine_argv, temporary=temporary)
                if process is not None:
                    _children.append(process)
                    return str(run_dir)
        except FileNotFoundError:
            continue  # a supervisor that was ending has removed its folder meanwhile
        # A supervisor holds its lock but does not listen: it is about to end.
        time.sleep(0.1)
    raise EngineLoading(f"The supervisor in {run_dir} neither answers nor ends.", retry_after_s=5.0)


def shared_dir(settings: Settings) -> Path | None:
    """A folder for what the HTTP workers of this server share, made if need be; None when there is but this process.

    It lies in the run directory and goes with it. One that a former server left in the same place is removed.

    Raises: SettingsError or OSError when the run directory cannot be used.
    """
    run_dir, owner_pid = run_dir_of(settings)
    if owner_pid == os.getpid():
        return None
    with _locked(_checked(run_dir)):
        folder = run_dir / f"workers-{owner_pid}"
        for path in run_dir.glob("workers-*"):
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def run_dir_of(settings: Settings) -> tuple[Path, int]:
    """The run directory of this server's supervisor, started or not, and the process it lives for."""
    if _started is not None:
        return Path(_started[0]), _started[1]
    owner_pid = _owner_pid()
    folder = settings.run_dir or os.path.join(tempfile.gettempdir(), f"nanogpt-{os.getuid()}-{owner_pid}")
    return Path(folder), owner_pid


def reap() -> None:
    """Take leave of supervisors that this process has started and that have ended."""
    _children[:] = [process for process in _children if process.poll() is None]


def connect(path: Path) -> socket.socket:
    """Raises: OSError when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


# -- parts ----------------------------------------------------------------------------------------------------


def _whereabouts(settings: Settings) -> tuple[Path, int]:
    """The run directory of this server, and the process that owns the server."""
    if _started is not None:
        return Path(_started[0]), _started[1]
    owner_pid = _owner_pid()
    name = f"nanogpt-{os.getuid()}-{owner_pid}"
    return Path(settings.run_dir or os.path.join(tempfile.gettempdir(), name)), owner_pid


def _owner_pid() -> int:
    """The process that the engine shall outlive by nothing: gunicorn's master for its workers, else this one."""
    is_gunicorn = os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/") and "gunicorn.arbiter" in sys.modules
    return os.getppid() if is_gunicorn else os.getpid()


def _checked(run_dir: Path) -> Path:
    """The folder, made if it is not there; refused unless it is this user's alone.

    Raises: SettingsError.
    """
    if len(os.fsencode(run_dir)) > _MAX_RUN_DIR_BYTES:
        raise SettingsError(
            f"The run directory {run_dir} has too long a path for a socket (limit: {_MAX_RUN_DIR_BYTES} bytes).",
            field="run_dir",
            remedy="Set NANOGPT_RUN_DIR to a shorter one.",
        )
    try:
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(mode=0o700, parents=True)
        found = run_dir.lstat()
    except OSError as error:
        raise SettingsError(f"The run directory {run_dir} cannot be made: {error.strerror}.", field="run_dir") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SettingsError(
            f"The run directory {run_dir} must be a folder that only you can enter (mode 0700).",
            field="run_dir",
            remedy=f"chmod 700 {run_dir}, or set NANOGPT_RUN_DIR to another.",
        )
    return run_dir


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """One starter at a time."""
    fd = os.open(run_dir / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _listens(run_dir: Path, owner_pid: int) -> bool:
    """Whether there is a supervisor; it then lives as long as this owner, too."""
    try:
        with connect(run_dir / "control.sock") as sock:
            sock.sendall(json.dumps({"owner": owner_pid}).encode() + b"\n")
            sock.settimeout(5.0)
            return bool(sock.recv(1))
    except OSError:
        return False


def _spawn(
    run_dir: Path, settings: Settings, owner_pid: int, engine_argv: tuple[str, ...], *, temporary: bool
) -> subprocess.Popen[bytes] | None:
    """A supervisor that listens; None when another one holds the folder.

    A session of its own: Ctrl-C in the terminal is for the HTTP server, which lets its requests finish first.
    """
    # The engine has no use for secrets.
    secrets = [field for field in dataclasses.fields(Settings) if field.metadata["secret"]]
    hidden = {field.metadata["env"] for field in secrets}
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    # NumPy multiplies no matrices here; its library's threads would each spin for a tenth of a second at every start.
    environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    home = Path(nanogpt.__file__).resolve().parents[1]
    if home.name not in ("site-packages", "dist-packages"):
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(home), environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "nanogpt.engine.supervisor"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
        start_new_session=True,
    )
    started = {
        "run_dir": str(run_dir),
        "owner_pid": owner_pid,
        "remove_run_dir": temporary,
        "engine_argv": list(engine_argv),
        "settings": {**dataclasses.asdict(settings), **{field.name: field.default for field in secrets}},
    }
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as stdin, process.stdout as stdout:
        try:
            stdin.write(json.dumps(started).encode() + b"\n")
            stdin.close()
            answer = json.loads(stdout.readline() or b"{}")
        except BrokenPipeError:
            answer = {}
    if "pid" in answer:
        return process
    process.wait()
    if "busy" in answer:
        return None
    raise EngineLoading("The engine's supervisor could not be started; the log says why.", retry_after_s=5.0)
