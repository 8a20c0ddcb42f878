"""Protects whoever types what the pages say: every command is run as it stands there, or listed with the reason.

The Chinese pages show the same commands (``test_docs.py`` compares them), so each is run once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_support import BIN, Server
from redis_server import RedisServer
from shell_blocks import MARKED_ELSEWHERE, NOT_HERE, PROGRAMS, Command, commands, python_program, translated
from support import ROOT, require_service

PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
RUN_HERE = [page for page in PAGES if any(not c.run_elsewhere and not c.why_not for c in commands(page))]
# Pages whose Python is a program; those of MARKED_ELSEWHERE have theirs marked block by block.
PYTHON = [page for page in ("docs/deployment.md", "docs/migrating.md") if python_program(page)]
# A text that the embedded model knows, so that it passes a gate of 1.6 nats.
VALIDATION = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_has_a_reason_not_to_be(page: str) -> None:
    unknown = [
        f"  {command.text}\n    calls {', '.join(sorted(command.programs - PROGRAMS))}"
        for command in commands(page)
        if not command.run_elsewhere and not command.why_not and not command.programs <= PROGRAMS
    ]
    assert not unknown, (
        f"{page} shows commands that are neither run nor listed. In tests/docs/shell_blocks.py, let them run "
        "(PROGRAMS, translated), or give the reason why no test can (NOT_HERE):\n" + "\n".join(unknown)
    )


def test_no_reason_is_without_its_command() -> None:
    shown = [command for page in PAGES for command in commands(page)]
    for page, beginning, _ in NOT_HERE:
        assert any(page in ("*", command.page) and re.match(beginning, command.form) for command in shown), (
            f"NOT_HERE lists {beginning} for {page}, which no page shows any more"
        )
    for page, test in MARKED_ELSEWHERE.items():
        assert any(command.marked for command in shown if command.page == page)
        assert (ROOT / test).is_file()


class Reader:
    """Somebody with a checkout and a trained model who types what a page says, server by server.

    A gunicorn of a form that was started already, with other variables only, and that nobody talks to on the page, is
    not started again: gunicorn is asked whether it would start.
    """

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.server: Server | None = None
        self.seen: set[str] = set()
        self.count = 0
        environment = {key: value for key, value in os.environ.items() if not key.startswith("NANOGPT_")}
        for key in ("MODEL_CHECKPOINT", "API_KEY", "ADMIN_KEY", "REDIS_URL", "MAKEFLAGS"):
            environment.pop(key, None)
        self.environment = environment | {"PATH": f"{BIN}:{os.environ['PATH']}", "NANOGPT_THREADS": "1"}

    def translated(self, text: str) -> str:
        url = self.server.url if self.server else "http://127.0.0.1:0"
        return translated(text, url=url, redis_url=self.redis_url, folder=self.folder, bin_folder=BIN)

    def serve(self, text: str) -> None:
        """Start it, and see that it is ready. The one before ends first, and by itself."""
        self.leave()
        self.count += 1
        folder = self.folder / f"server-{self.count}"
        folder.mkdir()
        command = ["bash", "-c", self.translated(text)]
        environment = {name: self.environment[name] for name in ("PATH", "NANOGPT_THREADS")}
        self.server = Server(command, folder, environment, self.folder)
        self.server.wait_ready()

    def leave(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.end()
            code = server.process.returncode
            assert code == 0 or "make" in server.process.args[-1], f"the server ended with {code}"

    def run(self, program: list[str]) -> str:
        result = subprocess.run(
            program, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=100
        )  # fmt: skip
        assert result.returncode == 0, f"{program[-1]}\n{result.stdout}\n{result.stderr}"
        assert not result.stdout.startswith('{"error"'), f"{program[-1]}\n{result.stdout}"
        return result.stdout

    def type(self, command: Command, is_talked_to: bool) -> None:
        assert command.programs <= PROGRAMS, f"nobody looked at what this does: {command.text}"
        if not command.serves:
            if self.server is None and command.asks_a_server:
                self.serve("python -m web.serve")
            self.run(["bash", "-euo", "pipefail", "-c", self.translated(command.text)])
            return
        text, form = self.translated(command.text).replace("PORT=0 ", ""), self.translated(command.form)
        is_new = (form if command.form.startswith("gunicorn") else text) not in self.seen
        if is_talked_to or is_new:
            self.serve(command.text)
        elif text not in self.seen:
            self.leave()
            self.run(["bash", "-c", self.translated(command.text).replace("gunicorn", "gunicorn --check-config", 1)])
        self.seen |= {text, form}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    require_service("curl", shutil.which("curl") is not None, "make services installs it")
    require_service("the command nanogpt", (BIN / "nanogpt").exists(), "make install puts it beside python")
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("log", "build", "dist"):
            (folder / entry.name).symlink_to(entry)
    (folder / "etc" / "prometheus").mkdir(parents=True)
    (folder / "val.txt").write_text(VALIDATION)
    redis = RedisServer(folder)
    typist = Reader(folder, redis.url)
    try:
        embedded = str(ROOT / "nanogpt" / "assets" / "default")
        typist.run([str(BIN / "nanogpt"), "convert", embedded, str(folder / "log"), "--to", "nanogpt", "--change-gelu"])
        (folder / "log" / "ckpt.pt").rename(folder / "log" / "model_40000.pt")
        yield typist
    finally:
        if typist.server is not None:
            typist.server.end()
        redis.stop()


@pytest.mark.services
@pytest.mark.timeout(400)  # a page starts many servers; each has its own limit
@pytest.mark.parametrize("page", RUN_HERE)
def test_what_the_page_shows_works(page: str, reader: Reader) -> None:
    here = [command for command in commands(page) if not command.run_elsewhere and not command.why_not]
    for command, following in zip(here, [*here[1:], None], strict=True):
        reader.type(command, is_talked_to=following is not None and not following.serves)
    if page in PYTHON:
        reader.run([sys.executable, "-c", reader.translated(python_program(page))])
    reader.leave()
