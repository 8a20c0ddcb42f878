"""``nanogpt reload``, ``rollback`` and ``models`` without a server that answers as wished: what a person then reads."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanogpt import cli
from nanogpt.cli import _admin

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_KEY", "admin")


@pytest.fixture
def stranger() -> Iterator[str]:
    """Some other HTTP server: it redirects one path, and answers text to all others."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path.startswith("/moved") else 200)
            self.send_header("Location", "/admin/models")
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("command", [["reload", "x"], ["rollback"], ["models"]])
@pytest.mark.parametrize(("key", "says"), [("", "ADMIN_KEY is not set."), ("s3cret\n", "a line break")])
def test_the_key_is_asked_for_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, command: list[str], key: str, says: str
) -> None:
    monkeypatch.setenv("ADMIN_KEY", key)
    assert cli.main([*command, "--url", "http://127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "s3cret" not in error


@pytest.mark.parametrize(
    ("argv", "exit_code", "says"),
    [
        (["reload", "x", "--loss-gate", "val.txt"], 2, "give both"),
        (["reload", "x", "--max-loss", "1"], 2, "give both"),
        (["models", "--url", "localhost:5000"], 2, "it must be like http://localhost:5000"),
        (["models", "--url", "file:///etc/passwd"], 2, "it must be like"),
        (["models", "--timeout", "0"], 2, "it must be above 0"),
        (["models", "--url", "http://127.0.0.1:1"], 1, "Cannot ask http://127.0.0.1:1: Connection refused."),
    ],
)
def test_what_cannot_be_asked(argv: list[str], exit_code: int, says: str, capsys: Capture) -> None:
    assert cli.main(argv) == exit_code
    out, error = capsys.readouterr()
    assert out == ""
    assert says in error


@pytest.mark.parametrize(("path", "says"), [("", "something else than JSON"), ("/moved", "answered 302")])
def test_another_server_gets_no_second_request_with_the_key(
    stranger: str, path: str, says: str, capsys: Capture
) -> None:
    """A redirection is not followed: who knows where to."""
    assert cli.main(["models", "--url", stranger + path]) == 1
    assert says in capsys.readouterr().err


def test_a_path_that_exists_here_is_told_in_full_to_a_server_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").mkdir()
    monkeypatch.chdir(tmp_path)
    for url in ("http://localhost:5000", "http://127.0.0.1", "http://[::1]:5000"):
        assert _admin.server_path("log", url) == str(tmp_path / "log")
    assert _admin.server_path("log", "http://gpu.example.com") == "log"
    assert _admin.server_path("elsewhere", "http://localhost:5000") == "elsewhere"


def test_a_switch_alone_means_true() -> None:
    parser, _ = cli.command_parser("serve")
    assert parser.parse_args(["log/", "--follow", "--port", "1"]).follow == "true"
    assert parser.parse_args(["log/", "--standby", "false"]).standby == "false"
    assert parser.parse_args(["log/"]).follow is None
