"""Streams and their clients against a real server: what is told, to whom, and what becomes of those who leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from typing import Any

import pytest
from http_support import (
    BIN,
    ENDLESS,
    ENDLESS_BODY,
    GUNICORN,
    START_S,
    TWO_WORKERS,
    Server,
    read_events,
    running,
    stream,
    wait_for,
)
from support import ROOT

Start = Callable[..., Server]


def raw_request(server: Server, body: dict[str, Any], *, more: bytes = b"") -> socket.socket:
    """A request on a socket of our own, so that we can leave as rudely as a client can."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    sock = socket.create_connection((host, int(port)), timeout=30)
    sock.sendall(head.encode() + b"\r\n\r\n" + data + more)
    return sock


# -- what a stream says -----------------------------------------------------------------------------------------


def test_a_stream_says_what_the_whole_answer_says(server: Server) -> None:
    body = {"prompt": "ROMEO:", "max_length": 60, "seed": 7}
    whole = server.generate(body).json()
    answer = stream(server, body)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"
    *pieces, (name, final) = read_events(answer)
    assert name == "message"
    assert "ROMEO:" + "".join(data["text"] for _, data in pieces) == whole["generated_text"]
    for answer_to in (whole, final):  # these tell of the run, not of the text
        del answer_to["timings"]
        del answer_to["usage"]["cached_tokens"]
    assert final == whole


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_reads_late_loses_nothing(server: Server, version: str) -> None:
    """Read when all of it has been computed; in chunks, and in HTTP/1.0 without. (A connection holds megabytes here:
    what it does not hold is tests/unit/test_web_direct.py's.)"""
    body = {"prompt": "ROMEO:", "max_length": 250, "temperature": 0.9, "logprobs": 20, "cache": False}
    data = json.dumps({**body, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as sock, server.engine() as engine:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect((host, int(port)))
        head = f"POST /generate HTTP/{version}\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert sock.recv(1, socket.MSG_PEEK), "it has begun"
        wait_for(lambda: engine.state().num_running == 0, 30, "all of the text is computed")
        answer = HTTPResponse(sock)
        answer.begin()
        events = [json.loads(line[6:]) for line in answer.read().split(b"\n\n") if line]
    assert events[-1]["generated_text"] == "ROMEO:" + "".join(event["text"] for event in events[:-1])
    assert sum(len(event["logprobs"]) for event in events[:-1]) == events[-1]["tokens_generated"] == 250


def test_the_same_seed_gives_the_same_text_on_one_worker_and_on_four(start: Start, server: Server) -> None:
    one = start(*GUNICORN)
    for seed in range(8):
        body = {"prompt": "KING", "max_length": 40, "seed": seed}
        assert one.generate(body).json()["generated_text"] == server.generate(body).json()["generated_text"]


def test_two_hundred_streams_at_once_none_lost_none_mixed_up(start: Start) -> None:
    server = start(*TWO_WORKERS)
    bodies = [{"prompt": "ROMEO:\nO", "max_length": 30, "seed": seed} for seed in range(200)]

    def streamed(body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        *pieces, (_, final) = read_events(stream(server, body))
        return "".join(data["text"] for _, data in pieces), final

    with ThreadPoolExecutor(200) as pool:
        results = list(pool.map(streamed, bodies))
    alone = [server.generate(body).json() for body in bodies]
    for (text, final), whole in zip(results, alone, strict=True):
        assert whole["prompt"] + text == final["generated_text"] == whole["generated_text"]
        assert final["tokens_generated"] == whole["tokens_generated"]
    assert len({text for text, _ in results}) > 150  # the seeds did make different texts


# -- clients that leave -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose texts end only when somebody ends them."""
    folder = tmp_path_factory.mktemp("endless")
    with running([str(BIN / "gunicorn"), *TWO_WORKERS[1:]], folder, ENDLESS, ROOT) as server:
        yield server


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("ahead", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["plain", "pipelined"])
@pytest.mark.parametrize("rude", [True, False], ids=["reset", "closed"])
def test_a_client_that_leaves_frees_its_place(endless: Server, streamed: bool, ahead: bytes, rude: bool) -> None:
    with endless.engine() as engine:
        sock = raw_request(endless, {**ENDLESS_BODY, "stream": streamed}, more=ahead)
        wait_for(lambda: engine.state().num_running == 1, START_S, "the request runs")
        if rude:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
        wait_for(lambda: engine.state().num_running == 0, 10.0, "its place is free")


def test_a_client_that_waits_is_not_taken_for_one_that_left(server: Server) -> None:
    """Two requests sent at once on one connection: both are answered, in order."""
    body = {"prompt": "KING", "max_length": 20, "seed": 1}
    second = json.dumps({**body, "seed": 2}).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    more = head + b"Content-Length: %d\r\n\r\n" % len(second) + second
    with raw_request(server, body, more=more) as sock:
        data = b""
        while part := sock.recv(65536):
            data += part
    answers = [json.loads(line) for line in data.split(b"\n") if line.startswith(b"{")]
    assert [answer["generated_text"] for answer in answers] == [
        server.generate({**body, "seed": seed}).json()["generated_text"] for seed in (1, 2)
    ]


def test_a_request_that_takes_too_long_ends_with_what_it_has(start: Start) -> None:
    server = start(*TWO_WORKERS, **ENDLESS, NANOGPT_REQUEST_TIMEOUT_S="0.3")
    answer = server.generate(ENDLESS_BODY)
    assert answer.status_code == 200
    assert answer.json()["finish_reason"] == "abort"
    assert answer.json()["tokens_generated"] > 0


# -- engines that end -------------------------------------------------------------------------------------------


def test_an_engine_that_dies_in_mid_stream(endless: Server) -> None:
    """The client gets an error event, and the next request is answered by the next engine."""
    answer = stream(endless, ENDLESS_BODY)
    events = read_events(answer)
    next(events)
    whole = ThreadPoolExecutor(1).submit(endless.generate, ENDLESS_BODY)
    with endless.engine() as engine:
        wait_for(lambda: engine.state().num_running == 2, START_S, "both run")
    killed = time.monotonic()
    os.kill(endless.pid_of("nanogpt.engine.process"), signal.SIGKILL)
    name, data = list(events)[-1]
    seen_s = time.monotonic() - killed
    assert (name, data["code"]) == ("error", "engine_died")
    assert whole.result().status_code == 503
    assert whole.result().headers["Retry-After"]
    again = endless.generate({"prompt": "To be", "max_length": 5})
    served_s = time.monotonic() - killed
    assert again.status_code == 200, again.text
    print(f"error event after {seen_s:.3f} s, next request answered after {served_s:.3f} s")
    assert seen_s < 2.0
    assert served_s < 5.0
