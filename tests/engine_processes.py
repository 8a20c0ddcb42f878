"""What tests of real engine processes share: a server with a fake engine, and what is left of it afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_engine import ENGINE_ARGV

from nanogpt.engine.client import EngineClient
from nanogpt.engine.launch import Handle, start_supervisor
from nanogpt.engine.messages import GenerateRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings

MARK = "ENGINE_TESTMARK"


def eventually(condition: Callable[[], Any], *, within_s: float = 15.0) -> Any:
    """Wait until the condition holds, and return what it gave."""
    until = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.01)
    return value


def marked_processes(mark: str) -> dict[int, str]:
    """Every living process that was started under the mark, by whomever: pid → command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # ended meanwhile; a zombie has no environment
    return found


def zombies() -> list[str]:
    mine = f" {os.getpid()} "
    stats = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state == "Z" and f" {parent} " == mine:
                stats.append(stat)
    return stats


def open_files() -> set[str]:
    folder = "/proc/self/fd"
    names = [name for name in os.listdir(folder) if os.path.lexists(f"{folder}/{name}")]  # but for listdir's own
    return {f"{name} {os.readlink(f'{folder}/{name}')}" for name in names}


class Served:
    """A supervisor with a fake engine, and clients of it."""

    def __init__(self, settings: Settings, owner_pid: int) -> None:
        self.settings = settings
        self.handle: Handle = start_supervisor(settings, owner_pid, engine_argv=ENGINE_ARGV)
        self._clients: list[EngineClient] = []

    def client(self, **changes: Any) -> EngineClient:
        client = EngineClient(Settings(**{**vars_of(self.settings), **changes}), engine_argv=ENGINE_ARGV)
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.handle.stop(10.0)


def vars_of(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def request(
    prompt: list[int] | None = None, *, max_tokens: int = 20, seed: int = 5, timeout_s: float = 60.0, **params: Any
) -> GenerateRequest:
    return GenerateRequest(
        prompt or [1, 2, 3], SamplingParams(max_tokens=max_tokens, seed=seed, **params), timeout_s=timeout_s
    )
