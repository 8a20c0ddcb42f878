"""Ten times more requests than the server can answer: what it still answers, and how fast it refuses the rest.

Capacity is measured first, with as many clients as the engine computes at once, each sending its next request when the
last one is answered. Then requests come at random times (Poisson), ten times as many a second, whether or not the
server keeps up.
"""

from __future__ import annotations

import errno
import json
import random
import selectors
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.client import HOST
from benchmarks.soak.run import free_port
from benchmarks.soak.server import Server

TIMES = 10
CLIENTS = 32
NEW_TOKENS = 128
WARM_UP_S = 3.0
ROUNDS = 5
# After the last request is sent: what is still under way by then never came.
LAST_S = 30.0


@dataclass
class Seen:
    """When answers came, and how long refusals took."""

    answered_at: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    """How much later than planned requests were sent: what the load itself could not keep up with."""


class Load:
    """Requests on plain sockets and one selector, each on a connection of its own.

    It shares its processors with the server, so it is made to cost little.
    """

    def __init__(self, port: int) -> None:
        body = json.dumps({"prompt": "To be", "max_length": NEW_TOKENS}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n"
        self._request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        self._address = (HOST, port)
        self._selector = selectors.DefaultSelector()
        self.seen = Seen()
        self.num_under_way = 0
        self.on_end: Callable[[], None] = lambda: None

    def send(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        self.num_under_way += 1
        if sock.connect_ex(self._address) not in (0, errno.EINPROGRESS):
            self._end(sock, "cannot connect")
            return
        self._selector.register(sock, selectors.EVENT_WRITE, (time.monotonic(), bytearray()))

    def poll(self, timeout_s: float) -> None:
        """Take what comes within this time, at least once."""
        for key, events in self._selector.select(max(0.0, timeout_s)):
            sock: Any = key.fileobj
            sent, content = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    sock.send(self._request)
                    self._selector.modify(sock, selectors.EVENT_READ, key.data)
                elif part := sock.recv(1 << 16):
                    content += part
                else:
                    self._take(sock, sent, bytes(content))
            except OSError as error:
                self._selector.unregister(sock)
                self._end(sock, type(error).__name__)

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            self._end(key.fileobj, "never answered")
        self._selector.close()

    def _take(self, sock: socket.socket, sent: float, content: bytes) -> None:
        """Its connection has ended, and with it the answer."""
        self._selector.unregister(sock)
        now = time.monotonic()
        head, _, body = content.partition(b"\r\n\r\n")
        status = head[9:12].decode() or "nothing"
        if status == "200" and b'"generated_text"' in body:
            self.seen.answered_at.append(now)
            self.seen.answered_s.append(now - sent)
        elif status in ("429", "503"):
            self.seen.refused_s.append(now - sent)
        self._end(sock, "" if status in ("200", "429", "503") else status)

    def _end(self, sock: Any, other: str) -> None:
        sock.close()
        self.num_under_way -= 1
        if other:
            self.seen.other.append(other)
        self.on_end()


def _closed(port: int, seconds: float) -> float:
    """Answers a second, with as many clients as there are places."""
    load = Load(port)
    until = time.monotonic() + WARM_UP_S + seconds
    load.on_end = lambda: load.send() if time.monotonic() < until else None
    for _ in range(CLIENTS):
        load.send()
    while load.num_under_way and time.monotonic() < until + LAST_S:
        load.poll(0.1)
    load.close()
    return sum(until - seconds <= at < until for at in load.seen.answered_at) / seconds


def _open(port: int, rate: float, seconds: float, seed: int) -> tuple[Seen, float]:
    """Requests at random times. Returns what was seen, and answers a second while they came."""
    load, draw = Load(port), random.Random(seed)
    start = time.monotonic()
    due = start + draw.expovariate(rate)
    while due < start + WARM_UP_S + seconds:
        load.poll(due - time.monotonic())
        while due <= (now := time.monotonic()):
            load.seen.late_s.append(now - due)
            load.send()
            due += draw.expovariate(rate)
    ended = time.monotonic()
    goodput = sum(ended - seconds <= at < ended for at in load.seen.answered_at) / seconds
    while load.num_under_way and time.monotonic() < ended + LAST_S:
        load.poll(0.1)
    load.close()
    return load.seen, goodput


def overload(folder: Path, workers: int, checkpoint: str, seconds: float, seed: int) -> dict[str, Any]:
    port = free_port()
    environment = {
        "MODEL_CHECKPOINT": checkpoint, "RATE_LIMIT": "off", "NANOGPT_LOG_LEVEL": "warning", "NANOGPT_MAX_QUEUE": "64",
        "NANOGPT_RUN_DIR": str(folder / "run"),
    }  # fmt: skip
    server = Server(port, workers, environment, folder / "log")
    rounds = []
    try:
        server.wait_ready()
        for number in range(ROUNDS):
            capacity = _closed(port, seconds)
            seen, goodput = _open(port, TIMES * capacity, seconds, seed + number)
            rounds.append({
                "capacity": round(capacity, 2), "goodput": round(goodput, 2), "share": round(goodput / capacity, 3),
                "refused": len(seen.refused_s), "answered": len(seen.answered_at),
                "refused_ms": _percentiles(seen.refused_s), "answered_ms": _percentiles(seen.answered_s),
                "late_ms": _percentiles(seen.late_s),
                "other": seen.other,
            })  # fmt: skip
    finally:
        server.stop()
    return {"benchmark": "overload", "times": TIMES, "workers": workers, "new_tokens": NEW_TOKENS, "rounds": rounds}


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {name: round(ordered[int(len(ordered) * share)] * 1000, 1) for name, share in names.items() if ordered}


def report(result: dict[str, Any]) -> int:
    """A line a round, the median, then one line of JSON. The exit code: 1 where goodput fell or something else came."""
    for at in result["rounds"]:
        print(
            f"capacity {at['capacity']:g}/s, at {result['times']} times that {at['goodput']:g}/s ({at['share']:.0%});"
            f" {at['refused']:,} refused, p50 {at['refused_ms'].get('p50')} ms, p99 {at['refused_ms'].get('p99')} ms;"
            f" sent late by {at['late_ms'].get('p99')} ms (p99);"
            f" anything else: {len(at['other'])}"
        )
    shares = [at["share"] for at in result["rounds"]]
    print(f"goodput, median: {statistics.median(shares):.0%} of capacity ({min(shares):.0%} to {max(shares):.0%})")
    print(json.dumps(result))
    return 1 if statistics.median(shares) < 0.9 or any(at["other"] for at in result["rounds"]) else 0
