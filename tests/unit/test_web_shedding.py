"""Protects the engine from a flood: who found the queue full or is over its limit is refused at once, in the words of
every other refusal, and nobody else with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask import Flask
from web_support import EchoClient, make_app

from nanogpt.errors import QueueFull, TooManyRequests
from nanogpt.web import shedding
from nanogpt.web.caller import Caller
from nanogpt.web.shedding import LoadShedder

BODY = b'{"prompt":"a","max_length":1}'
PEER = ("127.0.0.1", 5000)


class Clock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(shedding, "time", clock)
    return clock


def make(clock: Clock, caller: str = "address:127.0.0.1", **settings: Any) -> tuple[Flask, LoadShedder]:
    """An app whose shedder has this client in mind."""
    app = make_app(**settings)
    shedder: LoadShedder = app.extensions["nanogpt.shedder"]
    shedder.note_full(Caller(caller))
    return app, shedder


def request(*more: bytes, line: bytes = b"POST /generate HTTP/1.1", body: bytes = BODY, length: bytes = b"") -> bytes:
    fields = [b"Host: x", b"Content-Type: application/json", b"Content-Length: " + (length or b"%d" % len(body)), *more]
    return b"\r\n".join([line, *fields, b"", body])


def parts(content: bytes) -> tuple[str, dict[str, str], dict[str, Any]]:
    head, _, body = content.partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    return line, dict(field.split(": ", 1) for field in fields), json.loads(body)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_the_refusal_is_the_apps_own(clock: Clock, path: str) -> None:
    app, shedder = make(clock)
    refusal = shedder.answer(request(b"X-Request-Id: me", line=f"POST {path} HTTP/1.1".encode()), PEER)
    assert refusal is not None
    line, headers, body = parts(refusal.content)
    usual = app.test_client().post(path, json={}, headers={"X-Request-Id": "me"})
    assert (usual.status_code, line) == (503, "HTTP/1.1 503 Service Unavailable")
    assert body == usual.json
    for name in ("Content-Type", "Content-Length", "X-Request-Id"):
        assert headers[name] == usual.headers[name]


def test_who_is_over_its_limit_hears_the_same_for_a_second(clock: Clock) -> None:
    """With the limit's own headers, and counted like every other refusal. Afterwards the ledger is asked again."""
    app = make_app(rate_limit="1 per minute")
    http, shedder = app.test_client(), app.extensions["nanogpt.shedder"]
    ask = {"prompt": "a", "max_length": 1}
    assert http.post("/generate", json=ask).status_code == 200
    first = http.post("/generate", json=ask, headers={"X-Request-Id": "me"})
    refusal = shedder.answer(request(b"X-Request-Id: me"), PEER)
    assert refusal is not None
    line, headers, body = parts(refusal.content)
    assert (first.status_code, line) == (429, "HTTP/1.1 429 Too Many Requests")
    assert body == first.json
    for name in ("Retry-After", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset", "RateLimit-Policy"):
        assert headers[name] == first.headers[name]
    clock.now += 1.0
    assert shedder.answer(request(), PEER) is None
    assert http.post("/generate", json=ask).status_code == 429


def test_nobody_is_refused_past_the_end_of_the_limit(clock: Clock) -> None:
    """Neither by what is remembered for longer than it lasts, nor because of the client's other requests."""
    _, shedder = make(clock)
    caller = Caller("address:192.0.2.1")
    shedder.note_limited(caller, TooManyRequests("Too many", retry_after_s=0.25))
    with pytest.raises(TooManyRequests):
        shedder.check(caller)
    clock.now += 0.25
    shedder.check(caller)
    shedder.check(caller)


@pytest.mark.parametrize(
    ("field", "keeps_alive"),
    [
        (b"Accept: */*", True),
        (b"Connection: keep-alive", True),
        (b"Connection: close", False),
        (b"connection: x", False),
    ],
)
def test_the_connection_stays_where_its_client_wants_it(clock: Clock, field: bytes, keeps_alive: bool) -> None:
    refusal = make(clock)[1].answer(request(field), PEER)
    assert refusal is not None
    assert refusal.keeps_alive == keeps_alive
    assert parts(refusal.content)[1]["Connection"] == ("keep-alive" if keeps_alive else "close")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /generate HTTP/1.1\r\n",
        request()[:-1],
        request() + b"P",
        request(length=b"+29"),
        request(length=b"29, 29"),
        request(b"Content-Length: 29"),
        request(b"Transfer-Encoding: chunked"),
        request(b"Expect: 100-continue"),
        request(b"Upgrade: h2c"),
        request(b"X_Forwarded_For: 1.1.1.1"),
        request(b"X-Key : a"),
        request(b" folded"),
        request(b"no colon"),
        request(b"A: 1\nB: 2"),
        request().replace(b"\r\n", b"\n"),
        request(line=b"POST /generate HTTP/1.0"),
        request(line=b"post /generate HTTP/1.1"),
        request(line=b"POST /generate?a=b HTTP/1.1"),
        request(line=b"POST http://x/generate HTTP/1.1"),
        request(line=b"GET /health HTTP/1.1"),
        request(line=b"POST /tokenize HTTP/1.1"),
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
def test_what_is_no_plain_whole_request_is_left_to_gunicorn(clock: Clock, data: bytes) -> None:
    assert make(clock)[1].answer(data, PEER) is None


def test_other_clients_are_not_refused(clock: Clock) -> None:
    _, shedder = make(clock)
    assert shedder.answer(request(), ("127.0.0.2", 5000)) is None
    # No proxy is trusted: an address that is made up changes nothing.
    assert shedder.answer(request(b"X-Forwarded-For: 127.0.0.2"), PEER) is not None
    assert shedder.answer(request(b"X-Forwarded-For: 127.0.0.1"), ("127.0.0.2", 5000)) is None


def test_behind_a_proxy_the_client_is_meant_and_not_the_proxy(clock: Clock) -> None:
    _, shedder = make(clock, "address:192.0.2.7", trusted_proxies=1)
    assert shedder.answer(request(b"X-Forwarded-For: 192.0.2.7"), PEER) is not None
    assert shedder.answer(request(b"X-Forwarded-For: 192.0.2.8"), PEER) is None


def test_a_key_is_asked_for_first(clock: Clock) -> None:
    """A wrong key hears that it is wrong, from the app; a right one is who is remembered, wherever it comes from."""
    app, shedder = make(clock, "key:default", api_key="sesame")
    assert shedder.answer(request(), PEER) is None
    assert shedder.answer(request(b"X-API-Key: other"), PEER) is None
    assert shedder.answer(request(b"Authorization: Bearer sesame"), PEER) is not None
    assert app.test_client().post("/generate", json={}).status_code == 401


def test_when_the_time_is_over_one_request_asks_for_all(clock: Clock) -> None:
    _, shedder = make(clock)
    caller = Caller("address:127.0.0.1")
    assert shedder.is_active
    clock.now += 0.2
    assert not shedder.is_active
    shedder.check(caller)
    assert shedder.is_active
    with pytest.raises(QueueFull):
        shedder.check(caller)
    shedder.note_room(caller)
    shedder.check(caller)
    shedder.check(caller)


def test_what_is_remembered_holds_no_refused_request(clock: Clock) -> None:
    """The error is raised again and again; were its traceback kept, so were the frames of every request."""
    _, shedder = make(clock)
    depths = []
    for _ in range(3):
        with pytest.raises(QueueFull) as refused:
            shedder.check(Caller("address:127.0.0.1"))
        depths.append(len(refused.traceback))
    assert depths == depths[:1] * 3


def test_a_short_queue_is_always_asked(clock: Clock) -> None:
    _, shedder = make(clock, max_queue=15)
    assert not shedder.is_active
    assert shedder.answer(request(), PEER) is None


def test_what_is_remembered_is_bounded(clock: Clock) -> None:
    _, shedder = make(clock)
    for number in range(5000):
        shedder.note_full(Caller(f"address:{number}"))
    assert len(shedder._memories) <= 1024


def test_the_app_learns_from_the_engine(clock: Clock) -> None:
    """A refusal by the engine is remembered, a text that it takes makes it forgotten."""
    client = EchoClient()
    app = make_app(client, response_cache=False)
    http, shedder = app.test_client(), app.extensions["nanogpt.shedder"]
    client.refuse = QueueFull("full")
    assert http.post("/generate", json={"prompt": "a", "max_length": 1}).status_code == 503
    assert shedder.answer(request(), PEER) is not None
    client.refuse = None
    assert http.post("/generate", json={"prompt": "a", "max_length": 1}).status_code == 503
    clock.now += 0.2
    assert http.post("/generate", json={"prompt": "a", "max_length": 1}).status_code == 200
    assert shedder.answer(request(), PEER) is None


def test_it_is_counted_and_logged_like_any_other(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    app, shedder = make(clock)
    http = app.test_client()
    line = 'nanogpt_http_requests_total{method="POST",route="/generate",status="503"}'

    def count() -> float:
        found = [text for text in http.get("/metrics").text.splitlines() if text.startswith(line)]
        return float(found[0].split()[-1]) if found else 0.0

    before = count()
    with caplog.at_level("INFO"):
        shedder.answer(request(b"X-Request-Id: shed-1"), PEER)
    assert count() == before + 1
    lines = [record.getMessage() for record in caplog.records if "shed-1" in record.getMessage()]
    assert [text.split(" id=")[0] for text in lines] == ["Request: POST /generate", "Response: 503 POST /generate"]
    assert "outcome=queue_full" in lines[1]
