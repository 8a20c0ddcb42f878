"""Protects the server from clients that want to cost it something: memory, threads, the engine's time."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from http_support import BIN, ENDLESS, ENDLESS_BODY, START_S, TWO_WORKERS, Server, running, wait_for
from support import ROOT

SMALL = 4096
Start = Callable[..., Server]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [str(BIN / TWO_WORKERS[0]), *TWO_WORKERS[1:]]
    with running(command, tmp_path_factory.mktemp("endless"), ENDLESS, ROOT) as server:
        yield server


def connect(server: Server, *, receive_bytes: int = 0) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.socket()
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(30)
    sock.connect((host, int(port)))
    return sock


def head(length: str) -> bytes:
    return f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()


def private_bytes(server: Server) -> int:
    """What all the server's processes hold and nobody else does."""
    total = 0
    for pid in server.pids():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024
    return total


def test_half_sent_requests_cost_no_memory_and_stop_nobody(endless: Server) -> None:
    """Slowloris: far more connections than a server with a process or a sync worker for each could hold."""
    before = private_bytes(endless)
    socks = [connect(endless) for _ in range(400)]
    try:
        for sock in socks:
            sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert endless.generate({"prompt": "To be", "max_length": 3}).status_code == 200
        grown = private_bytes(endless) - before
        assert grown < 64 << 20, f"{grown:,} bytes for 400 connections"
    finally:
        for sock in socks:
            sock.close()


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_gigabyte_costs_no_memory(endless: Server, announced: bool) -> None:
    """It is refused by its announcement, or as soon as more than the limit has come."""
    before = private_bytes(endless)
    with connect(endless) as sock:
        length = "Content-Length: 1073741824" if announced else "Transfer-Encoding: chunked"
        sock.sendall(
            f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()
        )
        block = b"a" * 65536
        sent = 0
        try:
            while not announced and sent < 1 << 30:
                sock.sendall(b"10000\r\n" + block + b"\r\n")
                sent += len(block)
        except OSError:
            pass  # the server has closed its side
        answer = sock.recv(65536)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert sent < 64 << 20, f"{sent:,} bytes were taken in"
    assert private_bytes(endless) - before < 16 << 20


def test_a_client_that_does_not_read_stops_nobody(endless: Server) -> None:
    """Its buffers fill and its own thread waits; the engine and everybody else go on at once."""
    with endless.engine() as engine, connect(endless, receive_bytes=SMALL) as sock:
        body = json.dumps({**ENDLESS_BODY, "stream": True}).encode()
        sock.sendall(head(f"Content-Length: {len(body)}") + body)
        assert sock.recv(100)  # the answer begins; nothing of it is read from here on
        wait_for(lambda: engine.state().num_running == 1, START_S, "the unread stream runs")
        for _ in range(5):
            assert endless.generate({"prompt": "To be", "max_length": 50}).json()["tokens_generated"] == 50


def test_a_flood_is_refused_before_gunicorn_reads_it(start: Start) -> None:
    """On kept-alive connections and fresh ones, and nobody else with it; other routes answer meanwhile, on the same
    connections, and when the queue is empty the client is served again."""
    environment = {**ENDLESS, "NANOGPT_MAX_BATCH_SIZE": "1", "NANOGPT_MAX_QUEUE": "16"}
    server = start("gunicorn", "-b", "127.0.0.1:0", "web.serve:app", **environment)
    body = json.dumps({**ENDLESS_BODY, "stream": True}).encode()
    request = head(f"Content-Length: {len(body)}") + body
    with ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(16)]
        for sock in held:
            sock.sendall(request)
        engine = stack.enter_context(server.engine())
        # One runs; the last places of the queue are not for whoever has filled it.
        wait_for(lambda: engine.state().num_waiting >= 13, START_S, "the queue is full for this client")
        flood = stack.enter_context(connect(server))

        def ask(content: bytes) -> tuple[int, bool]:
            """The status, and whether gunicorn has written the answer."""
            flood.sendall(content)
            answer = http.client.HTTPResponse(flood)
            answer.begin()
            answer.read()
            return answer.status, answer.headers["Server"] is not None

        def is_shed() -> bool:
            status, by_gunicorn = ask(request)
            assert status == 503
            return not by_gunicorn

        wait_for(is_shed, START_S, "a refusal that gunicorn has not seen")
        assert ask(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n") == (200, True)
        wait_for(is_shed, START_S, "a refusal on the same connection")
        for sock in held:
            sock.close()
        wait_for(lambda: server.generate({"prompt": "a", "max_length": 1}).status_code == 200, START_S, "room again")
