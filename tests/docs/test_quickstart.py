"""Protects the first ten minutes of a user: what the quickstart says to type is typed here, against a real server.

A block of code behind ``<!-- test -->`` is run; one behind ``<!-- test: the same keys -->`` is compared with what the
block before it printed. The Chinese pages hold the same blocks (``test_docs.py`` compares them); the other commands of
these pages are run by ``test_shell_blocks.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, require_service

PAGES = ["README.md", "docs/quickstart.md"]
BIN = Path(sys.executable).parent
MARKED = re.compile(r"^<!-- test(: the same keys)? -->\n```(\w+)\n(.*?)^```$", re.M | re.S)


@dataclass
class Block:
    language: str
    code: str
    compare: bool


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(match[2], match[3], bool(match[1])) for match in MARKED.finditer(text)]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NANOGPT_")}
    for key in ("MODEL_CHECKPOINT", "API_KEY", "HOST"):
        kept.pop(key, None)
    return kept | {"OMP_NUM_THREADS": "1", "RATE_LIMIT": "off"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that was started as `make serve` does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "web.serve"], cwd=ROOT, env=environment() | {"PORT": str(port)}, stderr=output
        )
    try:
        deadline = time.monotonic() + 60
        while not healthy(address):
            assert process.poll() is None, f"the server ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"not healthy after 60 s:\n{log.read_text()}"
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def same_keys(documented: Any, real: Any, where: str = "the answer") -> None:
    assert type(documented) is type(real), f"{where} is {real!r}"
    if isinstance(documented, dict):
        assert list(documented) == list(real), f"the fields of {where}"
        for key, value in documented.items():
            same_keys(value, real[key], f"{where}.{key}")


@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_says_works(page: str, server: str) -> None:
    require_service("curl", shutil.which("curl") is not None, "make services installs it")
    require_service("the command nanogpt", (BIN / "nanogpt").exists(), "make install puts it beside python")
    marked = blocks(page)
    assert any(block.language == "bash" for block in marked), "the page shows a command"
    printed = ""
    for block in marked:
        if block.compare:
            same_keys(json.loads(block.code), json.loads(printed))
            continue
        code = block.code.replace("http://localhost:5000", server).replace(".venv/bin/", f"{BIN}/")
        command = ["bash", "-euo", "pipefail", "-c", code] if block.language == "bash" else [sys.executable, "-c", code]
        result = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=100
        )  # fmt: skip
        assert result.returncode == 0, f"{block.code}\n{result.stdout}\n{result.stderr}"
        printed = result.stdout
        assert printed.strip(), f"printed nothing:\n{block.code}"
        assert '"error"' not in printed, f"{block.code}\n{printed}"
