"""The host's ledger over a real socket: exact for any number of workers and threads, whatever happens to them."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanogpt.engine import ledger as module
from nanogpt.engine import wire
from nanogpt.engine.ledger import SOCKET, Ledger, LedgerClient
from nanogpt.engine.windows import Rule
from nanogpt.errors import ServiceUnavailable


class Host:
    """A ledger in a loop like the supervisor's."""

    def __init__(self, run_dir: Path) -> None:
        self.selector = selectors.DefaultSelector()
        self.ledger = Ledger(self.selector, run_dir)
        self.path = run_dir / SOCKET
        self.is_open = True
        self.may_run = threading.Event()
        self.may_run.set()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while self.is_open:
            for key, _ in self.selector.select(0.02):
                self.may_run.wait()
                assert key.data is self.ledger
                self.ledger.on_readable(key.fileobj)

    def close(self) -> None:
        self.may_run.set()
        self.is_open = False
        self.thread.join()
        self.ledger.close()
        assert not self.selector.get_map(), "nothing stays registered"
        self.selector.close()
        self.path.unlink()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.close()


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[list[LedgerClient]]:
    clients = [LedgerClient(lambda: tmp_path, lambda: None) for _ in range(4)]
    yield clients
    for client in clients:
        client.close()


RULES = [Rule("requests", 50, 60)]
TOKENS = [Rule("tokens", 100, 60)]


def test_it_is_exact_over_workers_and_threads(host: Host, clients: list[LedgerClient]) -> None:
    with ThreadPoolExecutor(32) as pool:
        taken = list(pool.map(lambda number: clients[number % 4].take("a", RULES), range(300)))
    assert sum(one.admitted for one in taken) == 50
    assert sorted(one.states[0].remaining for one in taken if one.admitted) == list(range(50))


def test_holds_are_exact_as_well(host: Host, clients: list[LedgerClient]) -> None:
    """Texts that begin at once take in full what they may use; nobody slips in between asking and taking."""

    def text(number: int) -> bool:
        admitted = clients[number % 4].take("a", TOKENS, 10, hold=str(number), hold_s=60).admitted
        if admitted:
            clients[number % 4].settle("a", TOKENS, str(number), 10)
        return admitted

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(text, range(100))) == 10


def test_what_was_not_used_is_given_back(host: Host, clients: list[LedgerClient]) -> None:
    first, second = clients[:2]
    assert first.take("a", TOKENS, 100, hold="h", hold_s=60).admitted
    assert not second.take("a", TOKENS, 1).admitted
    first.settle("a", TOKENS, "h", 40)
    assert first.take("a", TOKENS, 60).admitted  # on the same connection: settled before
    assert not second.take("a", TOKENS, 1).admitted


def test_what_a_dead_worker_held_counts_as_used_and_no_longer_than_that(
    host: Host, clients: list[LedgerClient]
) -> None:
    first, second = clients[:2]
    assert first.take("a", TOKENS, 100, hold="h", hold_s=100_000).admitted
    first.close()
    until = time.monotonic() + 10
    while True:  # the ledger hears of the closed connection in its own time
        state = second.take("a", TOKENS, 1).states[0]
        if state.retry_after_s > module._ANSWER_S:
            break
        assert time.monotonic() < until
    assert state.retry_after_s == pytest.approx(60, abs=10)


def test_a_new_supervisor_is_found(tmp_path: Path, clients: list[LedgerClient]) -> None:
    client = clients[0]
    for _ in range(3):
        host = Host(tmp_path)
        try:
            assert client.take("a", RULES).states[0].remaining == 49
        finally:
            host.close()


def test_a_supervisor_that_starts_is_waited_for(tmp_path: Path) -> None:
    """Where nobody has started one, the first request does, and is not refused for that."""
    hosts: list[Host] = []

    def wake() -> None:
        if not hosts:
            hosts.append(Host(tmp_path))

    client = LedgerClient(lambda: tmp_path, wake)
    try:
        assert client.take("a", RULES).admitted
    finally:
        client.close()
        hosts[0].close()


def test_without_a_ledger_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the supervisor there is no engine, either: nothing is lost, and no limit broken."""
    monkeypatch.setattr(module, "_START_S", 0.0)
    woken: list[bool] = []
    client = LedgerClient(lambda: tmp_path, lambda: woken.append(True))
    with pytest.raises(ServiceUnavailable, match="could not be counted"):
        client.take("a", RULES)
    assert woken
    client.settle("a", TOKENS, "h", 1)


def test_a_ledger_that_hangs_is_not_waited_for_long(
    host: Host, clients: list[LedgerClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 0.1)
    host.may_run.clear()
    with pytest.raises(ServiceUnavailable):
        clients[0].take("a", RULES)
    host.may_run.set()
    monkeypatch.setattr(module, "_ANSWER_S", 5.0)
    assert clients[0].take("b", RULES).states[0].remaining == 49, "no answer of the former question is taken for this"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        wire.pack(["no number"]),
        wire.pack([0]),
        wire.pack([0, "a", [["requests"]], 1, "", 0]),
        wire.pack([0, "a", [["requests", "many", 60]], 1, "", 0]),
        wire.pack([1, "a", 5, "h", 1]),
    ],
)
def test_nonsense_ends_the_connection_that_sent_it_and_nothing_else(
    host: Host, clients: list[LedgerClient], data: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(host.path))
        sock.settimeout(10)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert clients[0].take("b", RULES).admitted
