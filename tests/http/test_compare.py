"""Two checkpoints on one server: each answers for itself, lives and dies for itself, and is changed for itself."""

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

from nanogpt.engine.client import EngineClient
from nanogpt.settings import Settings

SHARED = find_shared() or ROOT / "shared"
GOOD = SHARED / "checkpoints" / "01_nanogpt_char"
TINY = SHARED / "checkpoints" / "01b_nanogpt_char_tiny"
ADMIN = {"X-API-Key": "admin"}
BODY = {"prompt": "ROMEO:", "max_length": 20, "seed": 1, "cache": False}
ENVIRONMENT = {
    "MODEL_CHECKPOINT": str(GOOD),
    "COMPARE_CHECKPOINT": str(TINY),
    "ADMIN_KEY": "admin",
    "NANOGPT_CONTEXT_OVERFLOW": "crop",  # texts as long as a test needs them
}

pytestmark = pytest.mark.usefixtures("shared")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(
        [str(BIN / TWO_WORKERS[0]), *TWO_WORKERS[1:]], tmp_path_factory.mktemp("server"), ENVIRONMENT, ROOT
    ) as server:
        yield server


def said(server: Server, model: str) -> str:
    answer = server.generate({**BODY, "model": model})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["generated_text"]
    return text


def reload(server: Server, checkpoint: Path, **more: Any) -> requests.Response:
    body = {"checkpoint": str(checkpoint), **more}
    return requests.post(f"{server.url}/admin/reload", json=body, headers=ADMIN, timeout=120)


def serving(server: Server) -> dict[str, str]:
    """The digest of each role's model."""
    models = server.get("/admin/models", headers=ADMIN).json()["models"]
    return {model["role"]: model["digest"] for model in models if model["state"] == "serving"}


def test_one_prompt_and_one_seed_on_two_checkpoints(server: Server) -> None:
    """What the second one says is what it says when it is the only one: it becomes the first by a reload."""
    first, second = said(server, "default"), said(server, "compare")
    assert first != second
    ids = [model["id"] for model in server.get("/v1/models").json()["data"]]
    assert ids == [GOOD.name, TINY.name]
    assert [said(server, name) for name in ids] == [first, second]
    digests = serving(server)
    assert reload(server, TINY).status_code == 200
    assert serving(server) == {"main": digests["compare"], "compare": digests["compare"]}
    wait_for(lambda: {said(server, "default") for _ in range(6)} == {second}, START_S, "every worker has the new first")
    assert said(server, "compare") == second
    listed = server.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [TINY.name, f"{TINY.name}@{digests['compare'][:8]}"]
    back = requests.post(f"{server.url}/admin/rollback", headers=ADMIN, timeout=120)
    assert back.json()["model"]["digest"] == digests["main"], "a rollback is the first model's"
    wait_for(lambda: {said(server, "default") for _ in range(6)} == {first}, START_S, "every worker is back")
    assert serving(server) == digests


def test_the_second_is_changed_before_it_is_trusted(server: Server, tmp_path: Path) -> None:
    """A checkpoint can be looked at by whoever names it, while everybody else gets what they got."""
    first, second, digests = said(server, "default"), said(server, "compare"), serving(server)
    half = tmp_path / "ckpt.pt"
    half.write_bytes((GOOD / "ckpt.pt").read_bytes()[:1_000_000])
    refused = reload(server, half, compare=True)
    assert (refused.status_code, refused.json()["code"]) == (400, "corrupt_checkpoint")
    assert (said(server, "default"), said(server, "compare")) == (first, second)
    whole = tmp_path / "candidate"
    shutil.copytree(GOOD, whole)
    with stream(server, {**BODY, "model": "compare", "max_length": 200}) as answer:
        events = read_events(answer)
        next(events)
        done = subprocess.run(
            [sys.executable, "-m", "nanogpt", "reload", str(whole), "--compare", "--url", server.url],
            env={**os.environ, "ADMIN_KEY": "admin"}, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith('To compare with, for requests with "model": "compare": candidate (')
        *_, (name, final) = events
    assert (name, final["tokens_generated"], final["model"]) == ("message", 200, TINY.name)
    assert final["generated_text"].startswith(second), "it ended on the model that it began on"
    wait_for(lambda: {said(server, "compare") for _ in range(6)} == {first}, START_S, "every worker has the new second")
    assert serving(server) == {"main": digests["main"], "compare": digests["main"]}
    assert reload(server, TINY, compare=True).json()["previous"]["digest"] == digests["main"]
    wait_for(lambda: {said(server, "compare") for _ in range(6)} == {second}, START_S, "every worker is back")


def test_the_death_of_one_is_not_the_others(server: Server) -> None:
    first, second = said(server, "default"), said(server, "compare")

    def pid(role: Any) -> int | None:
        client = EngineClient(Settings(run_dir=str(server.run_dir)), role=role)
        try:
            return client.wait_ready(START_S).engine_pid
        finally:
            client.close()

    old = pid("compare")
    assert old is not None
    with stream(server, {**BODY, "max_length": 200}) as answer:
        events = read_events(answer)
        next(events)
        os.kill(old, signal.SIGKILL)
        *_, (name, final) = events
    assert (name, final["tokens_generated"]) == ("message", 200)
    assert server.get("/ready").status_code == 200
    wait_for(lambda: pid("compare") not in (None, old), START_S, "another engine")
    wait_for(lambda: server.get("/health").json()["compare"] == "healthy", START_S, "the worker has heard of it")
    assert said(server, "compare") == second
    killed = pid("main")
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    assert said(server, "compare") == second
    # A request that meets an engine in the moment of its death is told so (503): not what is looked at here.
    wait_for(lambda: pid("main") not in (None, killed), START_S, "another engine")
    wait_for(lambda: server.get("/ready").status_code == 200, START_S, "the worker has heard of it")
    assert said(server, "default") == first
    assert server.get("/health").json()["compare"] == "healthy"


def test_sigterm_lets_texts_on_both_finish_and_leaves_nobody(start: Callable[..., Server]) -> None:
    server = start(*GUNICORN, **ENVIRONMENT)
    with (
        stream(server, {**BODY, "max_length": 200}) as one,
        stream(server, {**BODY, "max_length": 200, "model": "compare"}) as two,
    ):
        both = [read_events(one), read_events(two)]
        for events in both:
            next(events)
        server.signal(signal.SIGTERM)
        for events in both:
            *_, (name, final) = events
            assert (name, final["tokens_generated"]) == ("message", 200)
    assert server.wait_exit() == 0
    server.wait_gone(5.0)
    assert "Traceback" not in server.log


def test_a_second_checkpoint_that_is_none_ends_the_start(tmp_path: Path) -> None:
    """In one line, as with the first: whoever set it wants it."""
    command = [sys.executable, "-m", "nanogpt", "serve", str(GOOD), "--port", "0"]
    command += ["--compare-checkpoint", str(tmp_path / "no.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert f"Error: There is nothing at {tmp_path / 'no.pt'}." in done.stderr
