"""The guide's commands, word for word but for the port, and its requests against the server that they start."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from http_support import BIN, GUNICORN, START_S, Server, running, wait_for
from support import ROOT

REQUEST = {"prompt": "Once upon a time", "max_length": 150, "temperature": 0.8, "top_k": 50}

Start = Callable[..., Server]


def check_guide(server: Server) -> None:
    health = server.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "healthy", "model_loaded": True, "device": "cpu"})
    answer = server.generate(REQUEST)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["prompt"] == REQUEST["prompt"]
    assert body["generated_text"].startswith(REQUEST["prompt"])
    assert body["tokens_generated"] <= 150  # none, when the end of the text is what the dice say first
    assert body["finish_reason"] in ("stop", "length")


def test_gunicorn_with_four_workers(server: Server) -> None:
    check_four_workers(server)


@pytest.mark.parametrize("extra", [["--timeout", "120"], ["--preload"]], ids=["timeout", "preload"])
def test_gunicorn_with_four_workers_and(start: Start, extra: list[str]) -> None:
    check_four_workers(start("gunicorn", "-w", "4", "-b", "127.0.0.1:0", *extra, "web.serve:app"))


def check_four_workers(server: Server) -> None:
    check_guide(server)
    wait_for(lambda: len(server.worker_pids()) == 4, START_S, "four workers")
    assert sum("nanogpt.engine.process" in command for command in server.pids().values()) == 1  # one model in memory


def test_python_m_web_serve(start: Start) -> None:
    check_guide(start("python", "-m", "web.serve"))


def test_nanogpt_serve_from_another_folder(start: Start, tmp_path: Path) -> None:
    """Every line of its log is JSON where that was asked for, and the line to try works as it stands there."""
    server = start("nanogpt", "serve", "--log-format", "json", cwd=tmp_path)
    check_guide(server)
    messages = [json.loads(line)["message"] for line in server.log.splitlines()]  # each line, gunicorn's too
    assert any(re.match(r"Serving .+ parameters.+ on cpu", message) for message in messages)
    assert any(message.startswith(f"Open at {server.url} to everybody") for message in messages)
    curl = next(message.removeprefix("Try: ") for message in messages if message.startswith("Try: curl "))
    answer = subprocess.run(curl + " -s", shell=True, capture_output=True, check=True, timeout=60)
    assert json.loads(answer.stdout)["generated_text"].startswith("Once upon a time")


def test_a_checkpoint_by_environment_and_by_argument(start: Start, shared_checkpoints: Path) -> None:
    path = str(shared_checkpoints / "01b_nanogpt_char_tiny" / "ckpt.pt")
    by_environment = start("python", "-m", "web.serve", MODEL_CHECKPOINT=path)
    by_argument = start("nanogpt", "serve", path)
    body = {"prompt": "KING", "max_length": 20, "seed": 5}
    first, second = by_environment.generate(body).json(), by_argument.generate(body).json()
    assert first["model"] == second["model"] == "01b_nanogpt_char_tiny"
    assert first["generated_text"] == second["generated_text"]


FAMILIES = (
    "01_nanogpt_char/ckpt.pt",
    "02_nanogpt_bpe",
    "03_build_nanogpt/log",
    "04_nano-gpt_fork/log",
    "04_nano-gpt_fork/logs_finetune/model_00030.pt",
    "05_llmc/gpt2_d2.bin",
    "06_hf_gpt2/safetensors",
)


@pytest.fixture(scope="module")
def changing(shared_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that began with the first family and is told to serve the others."""
    environment = {"MODEL_CHECKPOINT": str(shared_checkpoints / FAMILIES[0]), "ADMIN_KEY": "admin"}
    folder = tmp_path_factory.mktemp("changing")
    with running([str(BIN / "python"), "-m", "web.serve"], folder, environment, ROOT) as server:
        yield server


@pytest.mark.parametrize("path", FAMILIES)
def test_every_family_answers_the_guides_request(changing: Server, shared_checkpoints: Path, path: str) -> None:
    """Each in an engine of its own, which is given the path as it is when a server starts."""
    if path != FAMILIES[0]:
        body = {"checkpoint": str(shared_checkpoints / path)}
        answer = requests.post(changing.url + "/admin/reload", json=body, headers={"X-API-Key": "admin"}, timeout=60)
        assert answer.status_code == 200, answer.text
    check_guide(changing)


def test_gunicorn_without_our_configuration_starts_one_engine(start: Start) -> None:
    """``-c /dev/null``: whichever worker needs the engine first starts it, and they share it all the same."""
    server = start(
        "gunicorn",
        "-c",
        "/dev/null",
        "-w",
        "3",
        "-k",
        "gthread",
        "--threads",
        "8",
        "-b",
        "127.0.0.1:0",
        "web.serve:app",
    )
    for _ in range(12):
        check_guide(server)
    assert sum("nanogpt.engine.process" in command for command in server.pids().values()) == 1


def test_flask_run(start: Start) -> None:
    server = start("flask", "--app", "web.serve", "run", "--port", "0", ready=False)
    found = wait_for(lambda: re.search(r"Running on (http://127\.0\.0\.1:\d+)", server.log), START_S, "flask listens")
    server.url = found[1]
    wait_for(lambda: server.get("/ready").status_code == 200, START_S, "ready")
    check_guide(server)


def test_importing_the_front_door_starts_nothing() -> None:
    code = (
        "import threading, web.serve; assert threading.active_count() == 1; "
        "import sys; assert 'numpy' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([BIN / "python", "-c", code], cwd=ROOT, check=True, timeout=60)


# -- refusals to start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "environment", "exit_code", "says"),
    [
        (["nanogpt", "serve", "/no/such/model.pt"], {}, 2, "/no/such/model.pt"),
        (["gunicorn", "-b", "127.0.0.1:0", "web.serve:app"], {"MODEL_CHECKPOINT": "/no/such/model.pt"}, 2, "/no/such"),
        (["python", "-m", "web.serve"], {"PORT": "web"}, 2, "PORT is 'web'; it must be an integer."),
        (["gunicorn", "web.serve:app"], {"NANOGPT_PORT": "1"}, 2, "Unknown environment variable NANOGPT_PORT."),
        (["python", "-m", "web.serve", "--prot", "80"], {}, 2, "unrecognized arguments: --prot"),
        (["nanogpt", "serve", "--max-queue", "-1"], {}, 2, "between 0 and 1e+06"),
        (["nanogpt", "serve"], {"RATE_LIMIT": "10 per fortnight"}, 2, "RATE_LIMIT is '10 per fortnight'"),
        (["nanogpt", "serve", "--config", "/no/such.toml"], {}, 2, "/no/such.toml"),
        (["nanogpt", "serve", "--host", "192.0.2.1"], {}, 1, "192.0.2.1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_one_clear_line(
    start: Start, command: list[str], environment: dict[str, str], exit_code: int, says: str
) -> None:
    server = start(*command, ready=False, **environment)
    assert server.wait_exit() == exit_code, server.log
    assert says in server.log
    assert "Traceback" not in server.log
    errors = [line for line in server.log.splitlines() if "rror: " in line]
    assert len(errors) == 1, server.log
    server.wait_gone(5.0)


def test_a_port_in_use_is_one_clear_line(start: Start, server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    second = start("nanogpt", "serve", "--port", port, ready=False)
    assert second.wait_exit() == 1
    assert "Cannot listen at" in second.log
    assert "Traceback" not in second.log


# -- who may come in --------------------------------------------------------------------------------------------


def test_the_key(start: Start) -> None:
    server = start(*GUNICORN, API_KEY="geheim-钥匙")
    assert server.get("/health").status_code == 200
    refusal = server.generate(REQUEST)
    assert (refusal.status_code, refusal.json()["error"]) == (401, "Invalid API key")
    for headers in ({"X-API-Key": "geheim-钥匙".encode()}, {"Authorization": "Bearer geheim-钥匙".encode()}):
        assert server.generate(REQUEST, headers=headers).status_code == 200
    assert "geheim" not in server.log
    for pid in server.pids():
        assert b"geheim" not in Path(f"/proc/{pid}/cmdline").read_bytes()
