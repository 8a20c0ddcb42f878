"""How a server comes to its end, or does not: signals, drains, reloads, and processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_support import ENDLESS, ENDLESS_BODY, GUNICORN, START_S, TWO_WORKERS, Server, read_events, stream, wait_for

Start = Callable[..., Server]
NANOGPT_SERVE = ("nanogpt", "serve")


def kept_alive(server: Server) -> socket.socket:
    """A connection that has had an answer and stays open."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=30)
    assert ask_health(sock)[1]["status"] == "healthy"
    return sock


def ask_health(sock: socket.socket) -> tuple[bytes, dict[str, Any]]:
    """The answer's head and its body."""
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    data = b""
    while not data.endswith(b"}\n"):
        part = sock.recv(65536)
        assert part, "the connection was closed"
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return head, json.loads(body)


@pytest.mark.parametrize(
    ("command", "to_all"),
    [(TWO_WORKERS, False), (NANOGPT_SERVE, False), (TWO_WORKERS, True)],
    ids=["gunicorn", "nanogpt", "systemd"],
)
def test_sigterm_lets_what_runs_finish(start: Start, command: tuple[str, ...], to_all: bool) -> None:
    """The stream is not lost, /health says what happens, the exit code is 0, nobody survives.

    systemd signals every process of the service, the engine and its supervisor too.
    """
    server = start(*command, **{**ENDLESS, "NANOGPT_MAX_NEW_TOKENS": "300"})
    body = {"prompt": "To be", "max_length": 300, "seed": 3}
    with stream(server, body) as answer, kept_alive(server) as other:
        events = read_events(answer)
        next(events)
        for pid in server.pids() if to_all else [server.process.pid]:
            os.kill(pid, signal.SIGTERM)
        health = wait_for(lambda: (said := ask_health(other)[1])["status"] != "healthy" and said, START_S, "it drains")
        assert health["status"] == "draining"
        assert health["model_loaded"] is False
        *_, (name, final) = events
    assert name == "message"
    assert final["tokens_generated"] == 300
    assert server.wait_exit() == 0
    server.wait_gone(5.0)
    assert "Traceback" not in server.log


def test_a_drain_has_an_end(start: Start) -> None:
    """A text that is not finished in time gets an error event, and the server its exit."""
    server = start(*TWO_WORKERS, **ENDLESS, NANOGPT_DRAIN_TIMEOUT_S="0.5")
    with stream(server, ENDLESS_BODY) as answer:
        events = read_events(answer)
        next(events)
        server.signal(signal.SIGTERM)
        *_, (name, data) = events
    assert (name, data["code"]) == ("error", "draining")
    assert server.wait_exit() == 0
    server.wait_gone(5.0)


@pytest.mark.parametrize("command", [TWO_WORKERS, NANOGPT_SERVE], ids=["gunicorn", "nanogpt"])
def test_ctrl_c_ends_at_once_and_without_a_traceback(start: Start, command: tuple[str, ...]) -> None:
    server = start(*command, **ENDLESS)
    with stream(server, ENDLESS_BODY) as answer:
        events = read_events(answer)
        next(events)
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground
        *_, (name, data) = events
    assert (name, data["code"]) == ("error", "draining")
    assert server.wait_exit(10.0) == 0
    server.wait_gone(5.0)
    assert "Traceback" not in server.log


def test_sighup_keeps_streams_and_the_engine(start: Start, tmp_path: Path) -> None:
    """New workers with the settings file as it is now; a health probe on an old connection sees no drain."""
    config = tmp_path / "settings.toml"
    config.write_text("max_prompt_chars = 1000\nmax_new_tokens = 10000000")
    server = start(*TWO_WORKERS, NANOGPT_CONFIG=str(config), NANOGPT_CONTEXT_OVERFLOW="crop")
    engine_pid, workers = server.pid_of("nanogpt.engine.process"), set(server.worker_pids())
    body = {**ENDLESS_BODY, "max_length": 300}
    with stream(server, body) as answer, kept_alive(server) as other:
        events = read_events(answer)
        next(events)
        config.write_text("max_prompt_chars = 5\nmax_new_tokens = 10000000\nmax_queue = 7")
        server.signal(signal.SIGHUP)

        def last_answer() -> bool:
            head, body = ask_health(other)
            assert body["status"] == "healthy"
            return b"Connection: close" in head

        wait_for(last_answer, START_S, "the old worker takes leave")
        *_, (name, final) = events
    assert (name, final["tokens_generated"]) == ("message", 300)
    wait_for(lambda: len(set(server.worker_pids()) - workers) == 2, START_S, "new workers")
    wait_for(lambda: not set(server.worker_pids()) & workers, START_S, "the old workers go")
    assert server.generate({"prompt": "To be, or not"}).json()["error"] == "Prompt too long"
    assert server.pid_of("nanogpt.engine.process") == engine_pid
    assert "at the next start only: max_queue" in server.log


def test_a_slip_in_the_settings_file_stops_no_server(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text("")
    server = start(*NANOGPT_SERVE, "--max-prompt-chars", "9", "--config", str(config))
    config.write_text("max_new_tokns = 5")
    server.signal(signal.SIGHUP)
    wait_for(lambda: "The former settings stay: Unknown key 'max_new_tokns'" in server.log, START_S, "it says so")
    config.write_text("max_new_tokens = 5\nmax_prompt_chars = 5")
    server.signal(signal.SIGHUP)
    refused = {"prompt": "To be", "max_length": 6}
    wait_for(lambda: server.generate(refused).status_code == 400, START_S, "the file is read again")
    assert server.generate({"prompt": "To be, or", "max_length": 5}).status_code == 200  # the flag is above the file


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_when_the_arbiter_is_killed_nobody_survives(start: Start, busy: bool) -> None:
    server = start(*TWO_WORKERS, **ENDLESS)
    assert len(server.pids()) >= 4
    answer = stream(server, ENDLESS_BODY) if busy else None
    server.process.kill()
    server.process.wait()
    killed = time.monotonic()
    server.wait_gone(15.0)
    print(f"all gone after {time.monotonic() - killed:.2f} s")
    if answer is not None:
        answer.close()


def test_a_killed_worker_takes_its_requests_along_and_nothing_else(start: Start) -> None:
    server = start(*TWO_WORKERS, **ENDLESS)
    with server.engine() as engine, stream(server, ENDLESS_BODY) as answer:
        wait_for(lambda: engine.state().num_running == 1, START_S, "the stream runs")
        workers = server.worker_pids()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: engine.state().num_running == 0, START_S, "its sequence is aborted")
        wait_for(lambda: len(set(server.worker_pids()) - set(workers)) == 2, START_S, "new workers")
        assert server.generate({"prompt": "To be", "max_length": 3}).status_code == 200
        assert answer.status_code == 200


def test_a_killed_supervisor_is_replaced(start: Start) -> None:
    server = start(*TWO_WORKERS)
    os.kill(server.pid_of("nanogpt.engine.supervisor"), signal.SIGKILL)
    # Until the workers have noticed, /ready may still say what it last knew.
    wait_for(lambda: server.get("/ready").status_code == 503, START_S, "the loss is noticed")
    wait_for(lambda: server.get("/ready").status_code == 200, START_S, "a new engine")
    assert server.generate({"prompt": "To be", "max_length": 3}).status_code == 200
    server.signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    server.wait_gone(5.0)


def test_secrets_are_in_no_log_of_any_process(start: Start) -> None:
    """Also in what gunicorn itself says of requests that are not HTTP."""
    secret = "xyzzySecret"
    server = start("gunicorn", "--log-level", "debug", *GUNICORN[1:], API_KEY=secret, NANOGPT_LOG_LEVEL="debug")
    good = {"X-API-Key": secret}
    assert server.generate({"prompt": secret, "max_length": 3}, headers=good).status_code == 200
    assert server.generate({"prompt": secret + "§"}, headers=good).status_code == 400
    assert server.get(f"/{secret}?key={secret}", headers=good).status_code == 404
    host, port = server.url.removeprefix("http://").split(":")
    for wrong in (
        f"{secret}\r\n\r\n",
        f"GET /{secret} HTTP/1.1\r\nX-API-Key {secret}\r\n\r\n",
        f"GET /{secret} HTTP/1.1\r\nX-API-Key : {secret}\r\n\r\n",
        f"GET /{secret} HTTP/9.9\r\n\r\n",
        f"{secret.lower()} /{secret} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"POST /generate?{secret} HTTP/1.1\r\nX-API-Key: {secret}\r\nContent-Type: application/json\r\n"
        f"Transfer-Encoding: chunked\r\n\r\n{secret}\r\n",
        f"POST /generate?{secret} HTTP/1.1\r\nX-API-Key: {secret}\r\nContent-Length: {secret}\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=30) as sock:
            sock.sendall(wrong.encode())
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(65536)
            assert b" 500 " not in answer.split(b"\r\n")[0], wrong
    server.signal(signal.SIGTERM)
    server.wait_exit()
    assert "Request: POST /generate" in server.log
    assert secret not in server.log
