"""The log: the guide's lines, one a record, and never a prompt, an answer, a key or a query string in them."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from web_support import EchoClient, make_app

from nanogpt import logs
from nanogpt.errors import QueueFull

SECRET = "xyzzySecret"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - (DEBUG|INFO|WARNING|ERROR) - .+")


class Log(io.StringIO):
    def lines(self) -> list[str]:
        return self.getvalue().splitlines()


@pytest.fixture(params=["text", "json"])
def log_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def log(log_format: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """The log as a process of ours writes it."""
    root, ours = logging.getLogger(), logging.getLogger("nanogpt")
    before = (root.handlers[:], root.level, ours.level)
    stream = Log()
    monkeypatch.setattr("sys.stderr", stream)
    # basicConfig(force=True) closes the handlers that it takes away: those are pytest's.
    monkeypatch.setattr(root, "handlers", [])
    logs.configure(log_format, "debug")
    yield stream
    root.handlers[:], root.level = before[0], before[1]
    ours.setLevel(before[2])


def test_a_request_leaves_the_guides_two_lines(log: Log, log_format: str) -> None:
    http = make_app().test_client()
    http.post("/generate", json={"prompt": "ab", "max_length": 7}, headers={"X-Request-Id": "r-1"}).close()
    first, second = log.lines()
    if log_format == "text":
        assert LINE.fullmatch(first)
        assert LINE.fullmatch(second)
        assert first.endswith(" - INFO - Request: POST /generate id=r-1")
        assert re.search(
            r" - INFO - Response: 200 POST /generate id=r-1 outcome=length tokens=7 ttft_s=[\d.]+ total_s=[\d.]+"
            r" prompt_tokens=2 queue_s=[\d.]+ model=echo cache=bypass caller=address:127\.0\.0\.1$",
            second,
        )
    else:
        assert json.loads(first)["message"] == "Request: POST /generate id=r-1"
        line = json.loads(second)
        assert {"time", "level", "message", "pid", "ttft_s", "total_s"} <= set(line)
        wanted = {"request_id": "r-1", "method": "POST", "path": "/generate", "status": 200, "tokens": 7,
                  "prompt_tokens": 2, "model": "echo", "caller": "address:127.0.0.1"}  # fmt: skip
        assert {name: line[name] for name in wanted} == wanted


def test_a_stream_is_logged_when_it_ends(log: Log) -> None:
    engine = EchoClient()
    engine.hold = True
    http = make_app(engine, stream_ping_s=0.05).test_client()
    answer = http.post("/generate", json={"prompt": "ab", "stream": True}, buffered=False)
    assert len(log.lines()) == 1
    answer.close()
    assert len(log.lines()) == 2
    assert "client_closed_request" in log.lines()[1]


def test_a_refusal_is_logged_with_its_code(log: Log) -> None:
    make_app().test_client().post("/generate", json={"prompt": ""}, headers={"X-Request-Id": "r"}).close()
    assert "Response: 400 POST /generate id=r outcome=invalid_request total_s=" in log.lines()[1]


def test_probes_are_logged_only_for_whoever_debugs(log: Log) -> None:
    logging.getLogger("nanogpt").setLevel("INFO")
    make_app().test_client().get("/health")
    assert log.lines() == []


def test_nothing_of_what_a_client_sends_is_in_the_log(log: Log) -> None:
    """Whatever a prompt or a key is put into, by a good request or a wrong one."""
    engine = EchoClient()
    http = make_app(engine, api_key=SECRET).test_client()
    good = {"X-API-Key": SECRET}
    requests: list[dict[str, Any]] = [
        {"json": {"prompt": SECRET, "max_length": 3}, "headers": good},
        {"json": {"prompt": SECRET, "max_length": 3, "stream": True}, "headers": good},
        {"json": {"prompt": SECRET, "max_length": SECRET}, "headers": good},
        {"json": {SECRET: 1}, "headers": good},
        {"json": {"prompt": "§" + SECRET}, "headers": good},
        {"data": SECRET, "headers": {**good, "Content-Type": "application/json"}},
        {"data": b"{}", "headers": {**good, "Content-Type": f"application/json; charset={SECRET}"}},
        {"data": b"{}", "headers": {**good, "Content-Type": f"{SECRET}/{SECRET}"}},
        {"json": {"prompt": "a"}, "headers": {"X-API-Key": SECRET + "x"}},
        {"json": {"prompt": "a"}, "headers": {"Authorization": f"Bearer {SECRET}"}},
        {"path": f"/generate?key={SECRET}", "json": {"prompt": "a"}, "headers": {**good, "Cookie": SECRET}},
        {"path": f"/{SECRET}", "headers": good},
        {"path": f"/health/{SECRET}", "headers": {**good, "X-Request-Id": f"{SECRET} {SECRET}"}},
        {"path": "/generate", "method": SECRET, "headers": good},
    ]
    for request in requests:
        http.open(**{"path": "/generate", "method": "POST", **request}).close()
    for failure in (QueueFull(SECRET), KeyError(SECRET), UnicodeError(SECRET)):
        engine.refuse = failure
        http.post("/generate", json={"prompt": SECRET}, headers=good).close()
    assert len(log.lines()) >= 2 * len(requests)
    assert SECRET not in log.getvalue()


def test_nobody_can_forge_a_line(log: Log, log_format: str) -> None:
    logging.getLogger("nanogpt.test").info("%s", "a\r\n2026-01-01 00:00:00,000 - ERROR - forged\u2028x\x1b[31m\x85")
    assert len(log.lines()) == 1
    if log_format == "text":
        assert r"a\r\n2026" in log.lines()[0]
        assert r"\u2028x\x1b[31m\x85" in log.lines()[0]


@pytest.mark.parametrize("given", ["abc-123", "A" * 128, "0af7651916cd43dd8448eb211c80319c", "a.b:c/d+e=f@g_h"])
def test_a_plain_request_id_is_kept(given: str) -> None:
    answer = make_app().test_client().get("/", headers={"X-Request-Id": given})
    assert answer.headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "a b", "A" * 129, "a\x7f", "<script>", "ä", "a;b"])
def test_any_other_is_replaced(given: str) -> None:
    environ = {"HTTP_X_REQUEST_ID": given}
    answer = make_app().test_client().get("/", environ_overrides=environ)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])


def test_refusals_carry_the_id_too() -> None:
    answer = make_app(api_key="k").test_client().get("/nothing", headers={"X-Request-Id": "mine"})
    assert answer.json["request_id"] == answer.headers["X-Request-Id"] == "mine"
