"""Fixtures of the tests of ``nanogpt doctor``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from checkpoint_files import write_nanogpt


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_CACHE_DIR", "off")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as nanoGPT leaves it, of the smallest model there is."""
    folder = tmp_path_factory.mktemp("out")
    write_nanogpt(folder)
    return str(folder)


class Stranger(BaseHTTPRequestHandler):
    """Some other server: it redirects /health, and writes control characters."""

    def do_GET(self) -> None:
        body = b"<h1>It works!</h1>"
        self.send_response(302 if self.path == "/health" else 200)
        self.send_header("Location", "https://elsewhere.example.com/\x1b[31m")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
