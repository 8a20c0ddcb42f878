"""The servers under load: how each is started, asked and ended. Every one on a free port of 127.0.0.1."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu.engines import EngineFailed
from benchmarks.cpu.install import Installer

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Server:
    """``row`` names the engine's own row in benchmarks.cpu that the figure is compared with."""

    name: str
    row: str
    path: str
    command: list[str]
    environment: dict[str, str]
    port: int

    def body(self, prompt: str, new_tokens: int) -> dict[str, Any]:
        if self.path == "/generate":
            return {"prompt": prompt, "max_length": new_tokens, "temperature": 0, "stream": True, "cache": False}
        return {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ours(folder: Path, precision: str, threads: int, workers: int) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "-w", str(workers), "-b", f"127.0.0.1:{port}", "web.serve:app"]
    environment = {
        "MODEL_CHECKPOINT": str(folder),
        "NANOGPT_PRECISION": precision,
        "NANOGPT_THREADS": str(threads),
        "RATE_LIMIT": "off",
        "NANOGPT_SPECULATE": "off",  # a model with random weights repeats itself
    }
    return Server(f"nano-gpt-api {precision}", f"nano-gpt-api {precision}", "/generate", command, environment, port)


def llama_server(installer: Installer, folder: Path, threads: int, streams: int, context: int) -> Server:
    port = free_port()
    gguf = installer.gguf(folder, "Q8_0", "untied")
    command = [str(installer.llama_cpp() / "llama-server"), "-m", str(gguf), "-t", str(threads), "-tb", str(threads)]
    command += ["-np", str(streams), "-c", str(streams * context), "-ub", "1024", "-cram", "0", "--no-webui"]
    command += ["--host", "127.0.0.1", "--port", str(port), "-ngl", "0"]
    return Server("llama-server Q8_0, head untied", "llama.cpp Q8_0, head untied", "/completion", command, {}, port)


@contextmanager
def running(server: Server, log: Path, limit_s: float) -> Iterator[None]:
    """The server, answering /health. It and its children have ended when the context has. Raises: EngineFailed."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            server.command,
            cwd=_ROOT,
            env={**os.environ, **server.environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        _wait_for_health(process, server, log, limit_s)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for_health(process: subprocess.Popen[bytes], server: Server, log: Path, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise EngineFailed(
                f"ended with exit code {process.returncode}: {lines[-1] if lines else 'it said nothing'}"
            )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise EngineFailed(f"did not answer /health within {limit_s:.0f} s (see {log})")
