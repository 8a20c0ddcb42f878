"""Real engine processes with the fake runner. Nothing that a test starts outlives it: no process, thread or file."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_processes import MARK, Served, eventually, marked_processes, open_files, zombies

from nanogpt.engine import launch
from nanogpt.settings import Settings


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The leak check around every test of this folder."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setattr(launch, "_started", None)
    files, threads = open_files(), set(threading.enumerate())
    yield mark
    try:
        eventually(lambda: not marked_processes(mark), within_s=5.0)
    finally:
        left = marked_processes(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left
    launch.reap()
    assert not zombies()
    assert not [thread.name for thread in set(threading.enumerate()) - threads]
    assert not open_files() - files


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """``serve(model="step_s=0.01", owner_pid=…, **settings)`` starts a server."""
    started: list[Served] = []

    def start(model: str = "", *, owner_pid: int | None = None, **settings: Any) -> Served:
        served = Served(Settings(model_checkpoint=model, **settings), owner_pid or os.getpid())
        started.append(served)
        return served

    yield start
    for served in started:
        served.close()
