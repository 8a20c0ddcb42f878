"""Servers for the tests: each leaves nothing behind, and that is checked after every test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from http_support import BIN, GUNICORN, Server, running
from support import ROOT


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers: ``start("gunicorn", "-w", "2", "web.serve:app", API_KEY="k")``."""
    servers: list[Server] = []

    def start(*command: str, ready: bool = True, cwd: Path = ROOT, **environment: str) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        words = [str(BIN / command[0]), *command[1:]]
        if command[0] == "nanogpt" and not Path(words[0]).exists():  # the package is not installed: a bare checkout
            words[:1] = [sys.executable, "-m", "nanogpt"]
            environment.setdefault("PYTHONPATH", str(ROOT))
        servers.append(Server(words, folder, environment, cwd))
        if ready:
            servers[-1].wait_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with four workers for tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("server")
    with running([str(BIN / "gunicorn"), "-w", "4", *GUNICORN[1:]], folder, {}, ROOT) as server:
        yield server
