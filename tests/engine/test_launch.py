"""Starting the supervisor: whose folder it lies in, who may be first, what a former one left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_processes import Served, eventually, marked_processes
from fake_engine import ENGINE_ARGV

from nanogpt.engine import launch
from nanogpt.engine.engines import MAX_PAUSE_S, pause_s
from nanogpt.engine.launch import connect, ensure_supervisor, start_supervisor
from nanogpt.errors import SettingsError
from nanogpt.settings import Settings


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def told_state(run_dir: Path) -> dict[str, object]:
    """What the supervisor says to whoever connects."""
    with connect(run_dir / "control.sock") as sock, sock.makefile() as lines:
        state: dict[str, object] = json.loads(lines.readline())
        return state


def end(run_dir: Path) -> None:
    """End the supervisor that lives there as its server would."""
    pid = told_state(run_dir)["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: launch.reap() or not Path(f"/proc/{pid}").exists())


def test_the_folder_is_for_its_user_only(run_dir: Path) -> None:
    settings = Settings(run_dir=str(run_dir))
    assert ensure_supervisor(settings, engine_argv=ENGINE_ARGV) == str(run_dir)
    assert run_dir.stat().st_mode & 0o777 == 0o700
    end(run_dir)
    assert run_dir.is_dir(), "a folder that somebody has chosen stays"
    assert not list(run_dir.glob("*.sock"))


@pytest.mark.parametrize("kind", ["open", "link", "file", "long", "foreign", "parentless"])
def test_a_folder_that_others_can_enter_is_refused(run_dir: Path, kind: str) -> None:
    if kind == "open":
        run_dir.mkdir(mode=0o755)
        run_dir.chmod(0o755)
    elif kind == "link":
        (run_dir.parent / "elsewhere").mkdir(mode=0o700)
        run_dir.symlink_to(run_dir.parent / "elsewhere")
    elif kind == "file":
        run_dir.touch(mode=0o700)
    elif kind == "long":
        run_dir = run_dir.parent / ("x" * 100)
    elif kind == "foreign":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        run_dir.mkdir(mode=0o700)
        os.chown(run_dir, 12345, 12345)
    else:
        run_dir.touch()
        run_dir = run_dir / "below-a-file"
    for start in (lambda s: start_supervisor(s, os.getpid(), engine_argv=ENGINE_ARGV), ensure_supervisor):
        with pytest.raises(SettingsError, match="run directory") as refused:
            start(Settings(run_dir=str(run_dir)))
        assert str(run_dir) in str(refused.value)


def test_a_temporary_folder_with_too_long_a_path_is_refused_and_removed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = run_dir / ("x" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(SettingsError, match="too long a path"):
        start_supervisor(Settings(), os.getpid(), engine_argv=ENGINE_ARGV)
    assert not list(deep.iterdir())


def test_sockets_of_a_former_supervisor_are_in_nobodys_way(run_dir: Path) -> None:
    run_dir.mkdir(mode=0o700)
    for name in ("control.sock", "engine-1.sock", "engine-7.sock"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(run_dir / name))
    settings = Settings(run_dir=str(run_dir))
    ensure_supervisor(settings, engine_argv=ENGINE_ARGV)
    eventually(lambda: told_state(run_dir)["state"] == "ready")
    assert not (run_dir / "engine-7.sock").exists()
    end(run_dir)


def test_two_servers_do_not_share_a_folder(serve: Callable[..., Served], run_dir: Path) -> None:
    serve(run_dir=str(run_dir))
    with pytest.raises(SettingsError, match="Another server uses the run directory"):
        start_supervisor(Settings(run_dir=str(run_dir)), os.getpid(), engine_argv=ENGINE_ARGV)


def test_workers_find_what_their_arbiter_has_started(serve: Callable[..., Served]) -> None:
    """Also after a fork, and although nobody has told them the folder."""
    served = serve()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ensure_supervisor(Settings()) == served.handle.run_dir else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


_WORKER = """
import json, os, sys
os.environ["SERVER_SOFTWARE"] = "gunicorn/27"
import gunicorn.arbiter
from nanogpt.engine.launch import connect, ensure_supervisor
from nanogpt.settings import Settings
from pathlib import Path
run_dir = ensure_supervisor(Settings(), engine_argv=tuple(json.loads(sys.argv[1])))
with connect(Path(run_dir) / "control.sock") as sock, sock.makefile() as lines:
    print(run_dir, json.loads(lines.readline())["pid"], flush=True)
    sys.stdin.read()
"""


def test_workers_that_race_start_one_supervisor(mark: str) -> None:
    """gunicorn without our configuration: its workers, which have nothing in common but their parent, share an engine,
    and one of them may go without taking it along."""
    argv = [sys.executable, "-c", _WORKER, json.dumps(ENGINE_ARGV)]
    pipe = subprocess.PIPE
    workers = [subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    told = {worker.stdout.readline() for worker in workers if worker.stdout}
    assert len(told) == 1
    run_dir, pid = told.pop().split()
    for worker in workers:
        worker.communicate()
    eventually(lambda: len(marked_processes(mark)) == 2, within_s=5.0)
    os.kill(int(pid), signal.SIGTERM)
    eventually(lambda: not Path(run_dir).exists())


def test_a_supervisor_lives_as_long_as_one_of_its_owners(run_dir: Path) -> None:
    settings = Settings(run_dir=str(run_dir))
    code = (
        "import sys; from nanogpt.engine.launch import ensure_supervisor; from nanogpt.settings import Settings;"
        f"ensure_supervisor(Settings(run_dir={str(run_dir)!r}), engine_argv={ENGINE_ARGV!r}); "
        "print(flush=True); input()"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout
    first.stdout.readline()
    pid = told_state(run_dir)["pid"]
    ensure_supervisor(settings, engine_argv=ENGINE_ARGV)
    first.kill()
    first.communicate()
    assert told_state(run_dir)["pid"] == pid
    end(run_dir)


def test_the_pause_before_a_start_grows_and_is_bounded() -> None:
    assert [pause_s(n, True) for n in range(1, 9)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert [pause_s(n, False) for n in range(1, 7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert pause_s(10**6, False) == MAX_PAUSE_S
