"""A server is told secrets in every place there is; none of them is ever in its log, however much of it is logged.

The log is that of all its processes (gunicorn's own lines, engine, supervisor), at level debug, in both formats.
"""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator

import pytest
import requests
from http_support import BIN, GUNICORN, START_S, Server, stream, wait_for
from support import ROOT

MARK = "Xq7Secret"
KEY = f"key-{MARK}"
GOOD = {"X-API-Key": KEY}
BASIC = base64.b64encode(f"user:{MARK}".encode()).decode()


@pytest.fixture(scope="module", params=["text", "json"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as nobody:  # bound, and not listening: the collector that cannot be reached
        nobody.bind(("127.0.0.1", 0))
        environment = {
            "API_KEY": KEY,
            "NANOGPT_LOG_FORMAT": str(request.param),
            "NANOGPT_LOG_LEVEL": "debug",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://user:{MARK}@127.0.0.1:{nobody.getsockname()[1]}/{MARK}?token={MARK}",
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {MARK},malformed {MARK}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        }
        server = Server(
            [str(BIN / "gunicorn"), "-w", "2", "--log-level", "debug", *GUNICORN[1:]],
            tmp_path_factory.mktemp(str(request.param)), environment, ROOT,
        )  # fmt: skip
        try:
            server.wait_ready()
            yield server
        finally:
            server.end()


def send_raw(server: Server, data: bytes) -> None:
    """Bytes that no client library would send."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


def requests_with_secrets(server: Server) -> None:
    url, body = server.url, {"prompt": f"My password is {MARK}", "max_length": 4}
    paths = ["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize", "/admin/reload", "/admin/rollback"]
    wrong_bodies = [
        MARK.encode(),
        f'{{"prompt": "{MARK}"'.encode(),
        f'{{"prompt": "{MARK}", "prompt": "{MARK}"}}'.encode(),
        f'["{MARK}"]'.encode(),
        b'\xff\xfe{"' + MARK.encode(),
    ]
    with requests.Session() as session:
        for path in paths:
            session.post(url + path, json=body, headers=GOOD, timeout=30)
            session.post(url + path, json={MARK: MARK, "checkpoint": f"/secret/{MARK}"}, headers=GOOD, timeout=30)
            session.post(url + path, json={"model": MARK, "messages": [{"role": "user", "content": MARK}]},
                         headers=GOOD, timeout=30)  # fmt: skip
            for data in wrong_bodies:
                headers = {**GOOD, "Content-Type": "application/json"}
                session.post(url + path, data=data, headers=headers, timeout=30)
        for extra in (
            {"X-API-Key": MARK},
            {"Authorization": f"Bearer {MARK}"},
            {"Authorization": f"Basic {BASIC}"},
            {**GOOD, "Cookie": f"session={MARK}"},
            {**GOOD, "User-Agent": MARK, "Referer": f"http://{MARK}/", "X-Forwarded-For": MARK, "X-Real-IP": MARK},
            {**GOOD, "X-Request-Id": f"{MARK} {MARK}"},
            {**GOOD, "traceparent": MARK, "tracestate": f"a={MARK}", "baggage": f"a={MARK}"},
            {**GOOD, "Accept": f"application/openmetrics-text; version={MARK}"},
            {**GOOD, "Host": MARK},
        ):
            session.post(url + "/generate", json={"prompt": MARK, "max_length": 2}, headers=extra, timeout=30)
            session.get(url + "/metrics", headers=extra, timeout=30)
        for path in (
            f"/{MARK}",
            f"/generate?api_key={MARK}",
            f"/health/{MARK}",
            f"/v1/models/{MARK}",
            f"/metrics?{MARK}",
        ):
            session.get(url + path, headers=GOOD, timeout=30)
            session.post(url + path, json=body, headers=GOOD, timeout=30)
        for kind in (f"{MARK}/{MARK}", f"application/json; charset={MARK}", f"multipart/form-data; boundary={MARK}"):
            session.post(url + "/generate", data=b"{}", headers={**GOOD, "Content-Type": kind}, timeout=30)
        session.request(MARK, url + "/generate", headers=GOOD, timeout=30)
        with stream(server, body, headers=GOOD) as answer:
            assert answer.content
        stream(server, {**body, "max_length": 500}, headers=GOOD).close()
    for data in (
        f"{MARK}\r\n\r\n",
        f"GET /{MARK} HTTP/9.9\r\n\r\n",
        f"GET / HTTP/1.1\r\n{MARK}\r\n\r\n",
        f"GET / HTTP/1.1\r\nX-API-Key {MARK}\r\n\r\n",
        f"GET / HTTP/1.1\r\nBad Name {MARK}: x\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nX: {MARK}\x00\r\n\r\n",
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {MARK}\r\n\r\n",
        f"POST /generate HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n{MARK}\r\n{MARK}",
        f"POST /generate HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 500\r\n\r\n{MARK}",
        f"GET / HTTP/1.1\r\nHost: x\r\nX-Long: {MARK * 2000}\r\n\r\n",
        f"GET /{MARK * 2000} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"\x16\x03\x01\x02{MARK}",
    ):
        send_raw(server, data.encode())


def test_no_secret_is_ever_in_the_log(server: Server) -> None:
    requests_with_secrets(server)
    wait_for(lambda: "collector did not take" in server.log, START_S, "the export fails, and says so")
    last = {**GOOD, "X-Request-Id": "the-last-one"}
    assert server.generate({"prompt": "To be", "max_length": 2}, headers=last).status_code == 200
    wait_for(lambda: server.log.count("the-last-one") >= 2, START_S, "the log has the last request")
    server.end()
    found = [line for line in server.log.splitlines() if MARK in line or BASIC in line]
    assert not found
    assert "Traceback" not in server.log
    assert server.log.count("Response: ") > 50, "the requests were logged"
    if server.environment["NANOGPT_LOG_FORMAT"] == "json":
        # The line before the log is set up is gunicorn's own.
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        assert sum("caller" in line for line in lines) > 50
