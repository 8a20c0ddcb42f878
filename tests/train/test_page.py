"""Protects docs/training.md: its commands are typed here, from an empty folder to a served model, with fewer steps."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import ROOT, require_service

BIN = Path(sys.executable).parent
MARKED = re.compile(r"^<!-- test(: in the background)? -->\n```bash\n(.*?)^```$", re.M | re.S)
URL = re.compile(r"https://raw\.githubusercontent\.com/karpathy/\S+")
# The same commands with less work; a page that a test could follow to the letter would be of no use to a person.
FEWER = " --set max_steps=12 --set warmup_steps=2 --set eval_batches=2 --set threads=1"


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def test_the_page_can_be_followed(shared: Path, tmp_path: Path) -> None:
    require_service("curl", shutil.which("curl") is not None, "make services installs it")
    require_service("the command nanogpt", (BIN / "nanogpt").exists(), "make install puts it beside python")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    text = tmp_path / "short.txt"
    text.write_bytes((shared / "data" / "tinyshakespeare.txt").read_bytes()[-200_000:])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NANOGPT_")}
    for key in ("MODEL_CHECKPOINT", "API_KEY", "HOST"):
        kept.pop(key, None)
    environment = kept | {"OMP_NUM_THREADS": "1", "NANOGPT_THREADS": "1", "PORT": str(port)}

    def translated(code: str) -> str:
        code = URL.sub(text.as_uri(), code).replace("http://localhost:5000", address).replace("-c 111540", "-c 5000")
        code = re.sub(r"^(\.venv/bin/nanogpt (?:train|finetune) .*)$", rf"\1{FEWER}", code, flags=re.M)
        return code.replace(".venv/bin/", f"{BIN}/")

    blocks = [
        (bool(match[1]), translated(match[2])) for match in MARKED.finditer((ROOT / "docs/training.md").read_text())
    ]
    assert sum(background for background, _ in blocks) == 1
    servers = []
    try:
        for background, code in blocks:
            command = ["bash", "-euo", "pipefail", "-c", f"exec {code}" if background else code]
            if background:
                with (tmp_path / "serve.log").open("wb") as log:
                    servers.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=log, stdout=log))
                wait_until_healthy(address, servers[0], tmp_path / "serve.log")
                continue
            result = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
            )  # fmt: skip
            assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
            assert '"error"' not in result.stdout, f"{code}\n{result.stdout}"
            if "curl -s -X" in code:
                assert '"model": "model_00012"' in result.stdout or '"model":"model_00012"' in result.stdout
    finally:
        for server in servers:
            server.terminate()
            assert server.wait(30) == 0, (tmp_path / "serve.log").read_text()


def wait_until_healthy(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not healthy(address):
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the server did not come up:\n{log.read_text()}")
        time.sleep(0.1)
