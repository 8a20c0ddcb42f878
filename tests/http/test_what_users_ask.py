"""Protects what people who deploy small GPTs asked for elsewhere in vain, as far as no other test does.

``docs/what-users-ask.md`` lists all of it, and where each is tested.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from http_support import ENDLESS, ENDLESS_BODY, GUNICORN, Server, read_events, stream
from support import ROOT, require_service

Start = Callable[..., Server]


def test_workers_never_touch_the_model_or_the_device(server: Server) -> None:
    """CUDA does not survive a fork (benoitc/gunicorn#3176): no worker has PyTorch or the weights."""
    assert server.generate({"prompt": "To be", "max_length": 3}).status_code == 200
    for pid in server.worker_pids():
        mapped = Path(f"/proc/{pid}/maps").read_text()
        for name in ("libtorch", "libcuda", "model.safetensors", "_kernels"):
            assert name not in mapped, f"worker {pid} has mapped {name}"


def test_a_stream_outlives_the_workers_time_limit(start: Start) -> None:
    """gunicorn#2537, #3410: sync workers are killed in mid-stream by --timeout. Ours go on."""
    server = start(GUNICORN[0], "--timeout", "2", *GUNICORN[1:], **ENDLESS, NANOGPT_REQUEST_TIMEOUT_S="5")
    workers = server.worker_pids()
    with stream(server, ENDLESS_BODY) as answer:
        *_, (name, final) = read_events(answer)
    assert (name, final["finish_reason"]) == ("message", "abort")
    assert final["timings"]["total_s"] > 4
    assert server.worker_pids() == workers


def test_memory_is_weights_and_little_else(server: Server) -> None:
    """vllm#4723: 20 GB for a model of 125 M. Ours, with 1.8 to 3 M weights and 40 slots: tens of MB."""
    pid = server.pid_of("nanogpt.engine.process")
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024
    assert private < 200 << 20, f"{private:,} bytes"


def test_nothing_is_fetched(shared_checkpoints: Path) -> None:
    """openai/tiktoken#394, #369: GPT-2's vocabulary is downloaded at the first use. Here, without any network."""
    unshare = ["unshare", "--net", "--map-root-user"]
    works = shutil.which("unshare") and subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
    require_service("unshare", bool(works), "it runs the command without a network")
    model = shared_checkpoints / "03_build_nanogpt" / "log"
    command = [*unshare, sys.executable, "-m", "nanogpt", "generate", str(model), "Hello", "--max-tokens", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("text", ["你好", "😀"])
def test_a_character_that_the_model_does_not_know_is_named(server: Server, text: str) -> None:
    """karpathy/nanoGPT#273, #434: ``KeyError``."""
    answer = server.generate({"prompt": "To be " + text})
    assert answer.status_code == 400
    assert text[0] in answer.json()["error"]
    assert "position 6" in answer.json()["error"]
