"""A load generator: N streams at once over plain sockets, every event's time of arrival. One thread, one selector.

It runs as a process of its own (``python client.py``, a JSON job on stdin, the result on stdout) and does as little
as it can while streams run, because it takes its processor time from the server that it measures: bytes are kept,
events are counted by their blank lines, and everything else is parsed afterwards.
"""

from __future__ import annotations

import itertools
import json
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

EVENT_END = b"\n\n"


@dataclass
class Stream:
    """``arrivals[i]`` is when event i was complete. Times in seconds of one monotonic clock."""

    connection: socket.socket
    sent: float
    received: bytearray = field(default_factory=bytearray)
    arrivals: list[float] = field(default_factory=list)
    counted: int = 0
    done: bool = False

    def take(self, data: bytes, now: float) -> None:
        """Events hold no line breaks, so a blank line ends one; the head of the answer ends in CR LF CR LF instead."""
        self.received += data
        events = self.received.count(EVENT_END, max(0, self.counted - 1))
        self.arrivals += [now] * events
        if events:
            self.counted = self.received.rindex(EVENT_END) + len(EVENT_END)
        self.done = data == b"" or self.received.endswith(b"0\r\n\r\n")


def request(host: str, port: int, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


def wave(port: int, path: str, bodies: list[dict[str, Any]], limit_s: float) -> list[Stream]:
    """One request for each body, all at the same moment, until the last stream has ended. Raises: TimeoutError."""
    host = "127.0.0.1"
    requests = [request(host, port, path, body) for body in bodies]
    connections = [socket.create_connection((host, port), limit_s) for _ in requests]
    try:
        return _converse(connections, requests, limit_s)
    finally:
        for connection in connections:
            connection.close()


def _converse(connections: list[socket.socket], requests: list[bytes], limit_s: float) -> list[Stream]:
    end = time.perf_counter() + limit_s
    streams = []
    with selectors.DefaultSelector() as selector:
        for connection, data in zip(connections, requests, strict=True):
            streams.append(Stream(connection, time.perf_counter()))
            connection.sendall(data)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, streams[-1])
        running = len(streams)
        while running:
            ready = selector.select(end - time.perf_counter())
            if not ready:
                raise TimeoutError(f"{running} of {len(streams)} streams had not ended after {limit_s:.0f} s")
            for key, _ in ready:
                stream: Stream = key.data
                stream.take(stream.connection.recv(65536), time.perf_counter())
                if stream.done:
                    selector.unregister(stream.connection)
                    running -= 1
    return streams


def body_of(answer: bytes) -> bytes:
    """The content of an HTTP answer. Raises: ValueError for any status but 200."""
    head, _, content = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise ValueError(f"answered {answer[:300].decode(errors='replace')}")
    if b"transfer-encoding: chunked" not in head.lower():
        return content
    parts = []
    while content:
        size_line, _, content = content.partition(b"\r\n")
        size = int(size_line.split(b";")[0], 16)
        if size == 0:
            break
        parts.append(content[:size])
        content = content[size + 2 :]
    return b"".join(parts)


def events_of(answer: bytes) -> list[dict[str, Any] | None]:
    """The JSON of each event, None for a ping; the last one is the summary. Raises: ValueError for a broken stream."""
    found: list[dict[str, Any] | None] = []
    for block in body_of(answer).split(EVENT_END):
        if block.startswith(b"event: error"):
            raise ValueError(f"the stream ended with {block.decode(errors='replace')[:300]}")
        if block.strip():
            found.append(json.loads(block[len(b"data: ") :]) if block.startswith(b"data: {") else None)
    if not found or found[-1] is None or not ("tokens_generated" in found[-1] or found[-1].get("stop")):
        raise ValueError(f"a stream ended without its summary, after {len(found)} events")
    return found


def tokens_of(final: dict[str, Any]) -> int:
    """New tokens, as the last event tells them: ours, then llama-server's name."""
    return int(final["tokens_generated"] if "tokens_generated" in final else final["tokens_predicted"])


def pieces_of(stream: Stream, events: list[dict[str, Any] | None]) -> list[float]:
    """When each piece of text arrived. Our last event is a summary without text; llama-server's has none either."""
    return [at for at, event in zip(stream.arrivals, events, strict=True) if event is not None][:-1]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """``waves`` lists of bodies. Aggregate rates by wave, and every first-token time and gap of all of them."""
    rates, first, gaps, tokens = [], [], [], []
    wall = cpu = 0.0
    for bodies in job["waves"]:
        cpu_before = time.process_time()
        streams = wave(job["port"], job["path"], bodies, job["limit_s"])
        cpu += time.process_time() - cpu_before
        parsed = [events_of(bytes(stream.received)) for stream in streams]
        seconds = max(stream.arrivals[-1] for stream in streams) - min(stream.sent for stream in streams)
        wall += seconds
        counts = [tokens_of(events[-1] or {}) for events in parsed]
        rates.append(sum(counts) / seconds)
        tokens += counts
        for stream, events in zip(streams, parsed, strict=True):
            pieces = pieces_of(stream, events)
            first.append(pieces[0] - stream.sent)
            gaps += [after - before for before, after in itertools.pairwise(pieces)]
    return {
        "tokens_per_s": rates,
        "ttft_s": first,
        "gaps_s": gaps,
        "tokens": tokens,
        "client_cpu_share": round(cpu / wall, 3),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(run(json.load(sys.stdin))))
    except (OSError, ValueError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
