"""The engine process's loop on a real socket, in this process: what clients that misbehave can and cannot do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from engine_processes import eventually, request
from fake_engine import CONFIG, SlowRunner
from fake_runner import FakeRunner, expected

from nanogpt.engine import server as server_module
from nanogpt.engine import wire
from nanogpt.engine.core import Engine
from nanogpt.engine.server import EngineServer
from nanogpt.errors import EngineDied


class Worker:
    """A worker's end of the socket, byte by byte."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10.0)
        self.socket.connect(str(path))
        self.frames = wire.Frames()
        self.output: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.accepted: list[int] = []
        self.refused: dict[int, str] = {}
        self.stats: dict[str, Any] = {}
        self.closed = False

    def send(self, *message: Any) -> None:
        self.socket.sendall(wire.pack(list(message)))

    def submit(self, number: int, **params: Any) -> None:
        self.send(*wire.submit_message(number, request(**params)))

    def read(self) -> None:
        """Take in whatever comes next."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        self.closed = not data
        self.frames.feed(data)
        for message in self.frames:
            if message[0] == wire.NEWS:
                _, accepted, refused, tokens, finished = message
                self.accepted += accepted
                self.refused.update({number: error["code"] for number, error in refused})
                for number, token_ids in zip(tokens[::3], tokens[1::3], strict=True):
                    self.output.setdefault(number, []).extend(token_ids)
                self.ended.update({number: fields[0] for number, fields in finished})
            elif message[0] == wire.STATS:
                self.stats = message[1]

    def read_until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            assert not self.closed, "the engine has closed the connection"
            self.read()


class Running:
    """A server in a thread of its own."""

    def __init__(self, path: Path, runner: FakeRunner, **settings: Any) -> None:
        self.runner = runner
        self.engine = Engine(runner, max_batch_size=4, max_batch_tokens=64, **settings)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(8)
        self.path = path
        self.server = EngineServer(self.engine, listener, hello={"model": "fake"}, drain_timeout_s=5.0)
        self.error: BaseException | None = None
        self.workers: list[Worker] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error = error

    def worker(self) -> Worker:
        self.workers.append(Worker(self.path))
        return self.workers[-1]

    def stop(self) -> None:
        for worker in self.workers:
            worker.socket.close()
        self.server.drain()
        self.thread.join()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(**settings: Any) -> Running:
        running.append(Running(tmp_path / "engine.sock", SlowRunner(CONFIG, 8, max_batch_tokens=64), **settings))
        return running[-1]

    yield start
    for one in running:
        one.stop()


def test_it_answers(start: Callable[..., Running]) -> None:
    worker = start().worker()
    worker.submit(3, max_tokens=5)
    worker.read_until(lambda: 3 in worker.ended)
    assert worker.accepted == [3]
    assert (worker.output[3], worker.ended[3]) == expected([1, 2, 3], seed=5, max_tokens=5, config=CONFIG)


def test_a_message_may_arrive_in_pieces(start: Callable[..., Running]) -> None:
    worker = start().worker()
    frame = wire.pack(wire.submit_message(1, request(max_tokens=3)))
    for i in range(len(frame)):
        worker.socket.send(frame[i : i + 1])
    worker.read_until(lambda: 1 in worker.ended)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 1) + b"\x90",
        wire.pack([wire.ABORT]),
        wire.pack([99, 1]),
        wire.pack([wire.SUBMIT, 1]),
        wire.pack([wire.SUBMIT, 1, [1], {}, "", "", "soon"]),
        wire.pack([wire.SUBMIT, [], [1], {}, "", "", 1.0]),
        struct.pack("<I", 6) + msgpack.packb({"a": [1, 2]}),
    ],
)
def test_who_does_not_speak_the_protocol_is_dropped_and_the_others_go_on(
    start: Callable[..., Running], garbage: bytes
) -> None:
    running = start()
    running.runner.step_s = 0.002  # type: ignore[attr-defined]
    good, bad = running.worker(), running.worker()
    good.submit(1, max_tokens=50)
    good.read_until(lambda: good.output)
    bad.submit(1, max_tokens=400)
    bad.socket.sendall(garbage)
    while not bad.closed and not bad.refused:
        bad.read()
    good.read_until(lambda: 1 in good.ended)
    assert good.output[1] == expected([1, 2, 3], seed=5, max_tokens=50, config=CONFIG)[0]
    if bad.closed:
        eventually(lambda: not running.engine.has_work())  # what it had asked for was ended


def test_params_that_cannot_be_are_refused_alone(start: Callable[..., Running]) -> None:
    worker = start().worker()
    worker.send(wire.SUBMIT, 1, [1], {"temperature": -1.0}, "", "", 1.0, 0)
    worker.send(wire.SUBMIT, 2, [1], {"no_such_thing": 1}, "", "", 1.0, 0)
    worker.send(wire.SUBMIT, 3, None, {}, "", "", 1.0, 0)
    worker.submit(4, max_tokens=2)
    worker.read_until(lambda: 4 in worker.ended)
    assert worker.refused == dict.fromkeys([1, 2, 3], "invalid_request")
    worker.send(wire.ABORT, 4)
    worker.send(wire.ABORT, 17)
    worker.submit(5, max_tokens=2)
    worker.read_until(lambda: 5 in worker.ended)


def test_a_worker_that_does_not_read_is_dropped_and_the_others_go_on(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unread tokens are kept up to a limit, never waited for: one stuck worker must not stop the engine."""
    monkeypatch.setattr(server_module, "MAX_UNREAD_BYTES", 20_000)
    running = start()
    stuck, good = running.worker(), running.worker()
    stuck.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection = eventually(lambda: next(iter(running.server._connections.values()), None))
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    # A large answer a step, and many requests one after the other.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for number in range(200):
            stuck.submit(number, max_tokens=10, logprobs=100)
    for number in range(3):
        good.submit(number, max_tokens=30)
    good.read_until(lambda: len(good.ended) == 3)
    assert all(good.output[number] for number in range(3))
    eventually(lambda: connection.closed)
    eventually(lambda: not running.engine.has_work())


def test_a_lost_device_is_told_to_everybody_and_ends_the_loop(start: Callable[..., Running]) -> None:
    running = start()
    running.runner.step_s = 0.002  # type: ignore[attr-defined]
    worker = running.worker()
    worker.submit(1, max_tokens=400)
    worker.read_until(lambda: worker.output)
    running.runner.lost = True
    worker.read_until(lambda: 1 in worker.ended)
    assert worker.ended == {1: "error"}
    running.thread.join()
    assert isinstance(running.error, EngineDied)


def test_a_failed_step_is_told_and_the_engine_goes_on(start: Callable[..., Running]) -> None:
    running = start()
    worker = running.worker()
    running.runner.fail_next = RuntimeError("out of memory")
    worker.submit(1, max_tokens=4)
    worker.read_until(lambda: worker.ended)
    worker.submit(2, max_tokens=4)
    worker.read_until(lambda: 2 in worker.ended)
    assert worker.ended == {1: "error", 2: "length"}


def test_an_abort_that_leaves_nothing_to_compute_is_told_too(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers show how many sequences run: the last one's end is news, also when the numbers went out a moment ago."""
    monkeypatch.setattr(server_module, "STATS_INTERVAL_S", 0.0)
    running = start()
    running.runner.step_s = 0.002  # type: ignore[attr-defined]
    worker = running.worker()
    worker.submit(1, max_tokens=400)
    worker.read_until(lambda: worker.output)
    worker.send(wire.ABORT, 1, "stop")
    worker.read_until(lambda: worker.stats and worker.stats["finished"]["stop"])
    assert worker.stats["num_running"] == 0
    assert worker.ended[1] == "stop"
