"""Builds the CPU image with the guide's command, runs it as docs/deployment.md says, asks it, and stops it.

`make image-test` runs it: minutes of compiling and downloading, which is why `make test` does not. ENGINE says by what
(docker or podman; the first that works), BUILD_FLAGS what the build needs besides (mirrors, certificates), RUN_FLAGS
the same of a run. The base image comes from a registry; without one, tools/stand_in_base.sh makes one by its name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest
from support import ROOT

IMAGE = "nano-gpt-api"
MAX_BYTES = 250_000_000
BUILD_S, START_S = 3600, 120
# Of the base image as Docker Hub has it. A stand-in is larger: then only what we add to it is judged.
BASE_BYTES = 125_000_000


def find_engine() -> str:
    names = [os.environ["ENGINE"]] if os.environ.get("ENGINE") else ["docker", "podman"]
    for name in names:
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, timeout=60).returncode == 0:
            return name
    pytest.fail(f"None of {', '.join(names)} works here.")


def run(*command: str, timeout_s: float = 120) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout.strip()


@pytest.fixture(scope="module")
def engine() -> str:
    engine = find_engine()
    flags = shlex.split(os.environ.get("BUILD_FLAGS", ""))
    if engine == "podman":
        flags += ["--format", "docker"]  # the other format knows no health checks
    run(engine, "build", *flags, "-t", IMAGE, ".", timeout_s=BUILD_S)
    return engine


@pytest.fixture(scope="module")
def server(engine: str) -> Iterator[tuple[str, str]]:
    """A container with nothing that it does not need, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hardened = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    flags = shlex.split(os.environ.get("RUN_FLAGS", ""))
    name = run(engine, "run", "-d", *flags, *hardened, "-p", f"127.0.0.1:{port}:5000", IMAGE).splitlines()[-1]
    try:
        until = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert time.monotonic() < until, run(engine, "logs", name)
                time.sleep(0.2)
        yield name, f"http://127.0.0.1:{port}"
    finally:
        subprocess.run([engine, "rm", "-f", name], capture_output=True, timeout=60)


def test_the_image_is_small(engine: str) -> None:
    def size(image: str) -> int:
        return int(run(engine, "image", "inspect", "--format", "{{.Size}}", image))

    [base] = set(re.findall(r"^FROM (python:\S+)", (ROOT / "Dockerfile").read_text("utf-8"), re.M))
    own = size(IMAGE) - size(base)
    print(f"{size(IMAGE) / 1e6:.0f} MB, of which {own / 1e6:.0f} MB are ours")
    assert own + min(size(base), BASE_BYTES) <= MAX_BYTES


def test_it_answers_without_rights(engine: str, server: tuple[str, str]) -> None:
    name, url = server
    body = json.dumps({"prompt": "Once upon a time", "max_length": 20}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["tokens_generated"] == 20
    assert run(engine, "exec", name, "id", "-u") == "10001"
    assert run(engine, "exec", name, "python", "/app/healthcheck.py").startswith("{")
    assert "Traceback" not in run(engine, "logs", name)


def test_nothing_of_the_build_is_left_in_it(engine: str, server: tuple[str, str]) -> None:
    name, _ = server
    assert run(engine, "exec", name, "ls", "/app").split() == ["gunicorn.conf.py", "healthcheck.py", "log", "web"]
    left = "command -v g++ || test -s /etc/pip.conf || test -e /src || python -Ic 'import torch' 2>/dev/null"
    run(engine, "exec", name, "sh", "-c", f"! {{ {left}; }}")


def test_a_stop_is_heard(engine: str, server: tuple[str, str]) -> None:
    """The last one: SIGTERM comes to gunicorn itself, which ends the engine, too."""
    name, _ = server
    run(engine, "stop", "-t", "60", name)
    assert run(engine, "inspect", "--format", "{{.State.ExitCode}}", name) == "0"
