"""Another model in a running server: reload, gates, rollback, a followed folder, and the signals after it. Real models.

One server with two workers follows a folder. The tests change what it serves, and each begins with whatever is served.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from http_support import BIN, GUNICORN, START_S, TWO_WORKERS, Server, read_events, running, stream, wait_for
from support import ROOT, find_shared

SHARED = find_shared() or ROOT / "shared"
GOOD = SHARED / "checkpoints" / "01_nanogpt_char"
TINY = SHARED / "checkpoints" / "01b_nanogpt_char_tiny"
KEY = {"X-API-Key": "user"}
ADMIN = {"X-API-Key": "admin"}
BODY = {"prompt": "ROMEO:", "max_length": 20, "seed": 1}

pytestmark = pytest.mark.usefixtures("shared")


@pytest.fixture(scope="module")
def log(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training run has left so far."""
    folder = tmp_path_factory.mktemp("training") / "log"
    folder.mkdir()
    shutil.copy(GOOD / "ckpt.pt", folder / "model_00100.pt")
    shutil.copy(GOOD / "meta.pkl", folder / "meta.pkl")
    return folder


@pytest.fixture(scope="module")
def server(shared: Path, tmp_path_factory: pytest.TempPathFactory, log: Path) -> Iterator[Server]:
    environment = {
        "MODEL_CHECKPOINT": str(log),
        "API_KEY": "user",
        "ADMIN_KEY": "admin",
        "NANOGPT_FOLLOW": "true",
        "NANOGPT_FOLLOW_INTERVAL_S": "0.2",
        "NANOGPT_CONTEXT_OVERFLOW": "crop",  # texts as long as a test needs them
    }
    with running(
        [str(BIN / TWO_WORKERS[0]), *TWO_WORKERS[1:]], tmp_path_factory.mktemp("server"), environment, ROOT
    ) as server:
        yield server


@pytest.fixture(scope="module")
def text(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = (SHARED / "data" / "tinyshakespeare.txt").read_text()
    path = tmp_path_factory.mktemp("text") / "val.txt"
    path.write_text(whole[-len(whole) // 10 :][:5000])
    return path


def admin(server: Server, path: str, body: Any = None) -> requests.Response:
    return requests.post(f"{server.url}/admin/{path}", json=body, headers=ADMIN, timeout=120)


def models(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get("/admin/models", headers=ADMIN).json()["models"]
    return found


def serving(server: Server) -> dict[str, Any]:
    [found] = [model for model in models(server) if model["state"] == "serving"]
    return found


def of(model: dict[str, Any], who: str, state: str) -> dict[str, Any] | None:
    return model if (model["who"], model["state"]) == (who, state) else None


def said(server: Server) -> str:
    answer = server.generate(BODY, headers=KEY)
    assert answer.status_code == 200
    written: str = answer.json()["generated_text"]
    return written


def wait_said(server: Server, wanted: str) -> None:
    """Every worker has switched, as far as a number of requests can tell."""
    wait_for(lambda: {said(server) for _ in range(8)} == {wanted}, START_S, "all workers serve it")


def test_a_stream_runs_on_through_a_reload_and_a_rollback(server: Server) -> None:
    before, first = said(server), serving(server)
    with stream(server, {**BODY, "max_length": 200}, headers=KEY) as answer:
        events = read_events(answer)
        next(events)
        changed = admin(server, "reload", {"checkpoint": str(TINY)})
        assert changed.status_code == 200
        assert changed.json()["card"]["n_embd"] < 192
        assert changed.json()["previous"]["digest"] == first["digest"]
        assert changed.json()["model"]["digest"] == serving(server)["digest"] != first["digest"]
        *_, (name, final) = events
    assert (name, final["tokens_generated"]) == ("message", 200)
    assert final["generated_text"].startswith(before)
    after = wait_for(lambda: (now := said(server)) != before and now, START_S, "the new model answers")
    wait_said(server, after)
    assert admin(server, "rollback").json()["model"]["digest"] == first["digest"]
    wait_said(server, before)
    assert [model["who"] for model in models(server)[:2]] == ["rollback", "admin"]


def test_a_gate_refuses_with_both_numbers_and_nothing_changes(server: Server, text: Path) -> None:
    before, first = said(server), serving(server)
    refused = admin(server, "reload", {"checkpoint": str(TINY), "loss_gate": {"text": str(text), "max_loss": 1.7}})
    assert (refused.status_code, refused.json()["code"]) == (422, "reload_failed")
    assert "nats a token; the gate admits 1.7000" in refused.json()["error"]
    assert (said(server), serving(server)) == (before, first)
    assert models(server)[0]["state"] == "failed"
    passed = admin(server, "reload", {"checkpoint": str(GOOD), "loss_gate": {"text": str(text), "max_loss": 1.7}})
    assert passed.status_code == 200


def test_files_that_are_no_models_are_refused_in_their_own_words(server: Server, tmp_path: Path) -> None:
    before = said(server)
    half = tmp_path / "ckpt.pt"
    half.write_bytes((GOOD / "ckpt.pt").read_bytes()[:1_000_000])
    for checkpoint, status, code in (
        (str(half), 400, "corrupt_checkpoint"),
        (str(tmp_path / "nothing"), 404, "checkpoint_not_found"),
        ("a\0b", 404, "checkpoint_not_found"),
    ):
        refused = admin(server, "reload", {"checkpoint": checkpoint})
        assert (refused.status_code, refused.json()["code"]) == (status, code), refused.text
    assert said(server) == before


def test_a_checkpoint_that_training_writes_is_served_once_it_is_whole(server: Server, log: Path) -> None:
    before = serving(server)
    whole = (TINY / "ckpt.pt").read_bytes()
    path = log / f"model_{99 + len(list(log.iterdir())):05}.pt"
    with path.open("wb") as file:
        file.write(whole[: len(whole) // 2])
        file.flush()
        failed = wait_for(lambda: of(models(server)[0], "follow", "failed"), START_S, "half is refused")
        assert serving(server) == before
        file.write(whole[len(whole) // 2 :])
    now = wait_for(lambda: of(models(server)[0], "follow", "serving"), START_S, "the whole one is served")
    assert now["path"] == failed["path"] == str(path)
    assert server.log.count(f"{failed['path']} is not served") == 1


def test_the_commands(server: Server, text: Path) -> None:
    def nanogpt(*words: str, key: str = "admin") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nanogpt", *words, "--url", server.url],
            env={**os.environ, "ADMIN_KEY": key}, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    digest = serving(server)["digest"]
    done = nanogpt("reload", os.path.relpath(GOOD, ROOT))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"from {GOOD}" in done.stdout
    back = nanogpt("rollback")
    assert back.returncode == 0
    assert digest[:12] in back.stdout.splitlines()[0]
    listed = nanogpt("models")
    assert listed.stdout.splitlines()[1].startswith("serving")
    assert listed.stdout.splitlines()[2].startswith("standby")
    wrong = nanogpt("reload", "no/such/file")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "There is nothing at no/such/file" in wrong.stderr
    assert nanogpt("reload", str(GOOD), key="user").returncode == 2
    gate = nanogpt("reload", str(TINY), "--loss-gate", str(text), "--max-loss", "0.1")
    assert gate.returncode == 1
    assert "the gate admits 0.1000" in gate.stderr


def test_new_workers_after_sighup_serve_what_is_served_now(server: Server) -> None:
    """And the stream that runs on the former model's engine meanwhile is not lost."""
    now = said(server)
    workers = set(server.worker_pids())
    with stream(server, {**BODY, "max_length": 200}, headers=KEY) as answer:
        events = read_events(answer)
        next(events)
        other = TINY if serving(server)["path"].startswith(str(GOOD)) else GOOD
        assert admin(server, "reload", {"checkpoint": str(other)}).status_code == 200
        server.signal(signal.SIGHUP)
        wait_for(lambda: len(set(server.worker_pids()) - workers) == 2, START_S, "new workers")
        *_, (name, final) = events
    assert (name, final["tokens_generated"]) == ("message", 200)
    wait_for(lambda: not set(server.worker_pids()) & workers, START_S, "the old workers go")
    after = said(server)
    assert after != now
    wait_said(server, after)


def test_sigterm_with_two_engines_lets_both_finish_and_leaves_nobody(start: Callable[..., Server]) -> None:
    """Ready turns 503, the streams on either model are whole, the exit code is 0."""
    server = start(*GUNICORN, MODEL_CHECKPOINT=str(GOOD), ADMIN_KEY="admin", NANOGPT_CONTEXT_OVERFLOW="crop")
    with stream(server, {**BODY, "max_length": 200}) as old:
        of_old = read_events(old)
        next(of_old)
        assert admin(server, "reload", {"checkpoint": str(TINY)}).status_code == 200
        assert sum("nanogpt.engine.process" in command for command in server.pids().values()) == 2
        with requests.Session() as session, stream(server, {**BODY, "max_length": 200}) as new:
            session.get(server.url + "/ready", timeout=30)
            of_new = read_events(new)
            next(of_new)
            server.signal(signal.SIGTERM)
            wait_for(lambda: session.get(server.url + "/ready", timeout=30).status_code == 503, START_S, "not ready")
            for events in (of_old, of_new):
                *_, (name, final) = events
                assert (name, final["tokens_generated"]) == ("message", 200)
    assert server.wait_exit() == 0
    server.wait_gone(5.0)
    assert "Traceback" not in server.log
