"""Waves of N streams at once, and every event's time of arrival. One thread, one selector.

It runs as a process of its own (``python -m benchmarks.http.client``, a JSON job on stdin, the result on stdout) and
does as little as it can while streams run, because it takes its processor time from the server that it measures: the
answers are those of ``nanogpt bench``, its event loop is not (docs/decisions.md), and events are read afterwards.
"""

from __future__ import annotations

import itertools
import json
import selectors
import socket
import sys
import time
from typing import Any

from nanogpt.bench.http import Answer, Target
from nanogpt.bench.stream import events, words_of


def wave(target: Target, path: str, bodies: list[dict[str, Any]], limit_s: float) -> list[Answer]:
    """One request for each body, all at the same moment, until the last answer has ended. Raises: TimeoutError;
    ValueError for what is not HTTP."""
    requests = [target.request("POST", path, json.dumps(body).encode()) for body in bodies]
    connections = [socket.create_connection((target.host, target.port), limit_s) for _ in requests]
    try:
        return _converse(connections, requests, limit_s)
    finally:
        for connection in connections:
            connection.close()


def _converse(connections: list[socket.socket], requests: list[bytes], limit_s: float) -> list[Answer]:
    end = time.perf_counter() + limit_s
    answers = []
    with selectors.DefaultSelector() as selector:
        for connection, request in zip(connections, requests, strict=True):
            answer = Answer()
            answer.started = time.perf_counter()
            connection.sendall(request)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, (connection, answer))
            answers.append(answer)
        running = len(answers)
        while running:
            ready = selector.select(end - time.perf_counter())
            if not ready:
                raise TimeoutError(f"{running} of {len(answers)} streams had not ended after {limit_s:.0f} s")
            for key, _ in ready:
                connection, answer = key.data
                data = connection.recv(65536)
                if not data or answer.feed(data, time.perf_counter()):
                    selector.unregister(connection)
                    running -= 1
    return answers


def pieces_of(answer: Answer) -> tuple[list[float], int]:
    """When each piece of text arrived, and the new tokens that the last event counts (it has no text). Our names are
    those of /generate, the others llama-server's. Raises: ValueError for a stream that is not whole."""
    if answer.status != 200:
        raise ValueError(f"answered {answer.status}: {words_of(answer)}")
    found = [(json.loads(data), at) for data, at in events(answer)]
    last: dict[str, Any] = found[-1][0] if found else {}
    if "error" in last:
        raise ValueError(f"the stream ended with {last}")
    if not ("tokens_generated" in last or last.get("stop")):
        raise ValueError(f"a stream ended without its summary, after {len(found)} events")
    return [at for _, at in found[:-1]], int(last.get("tokens_generated", last.get("tokens_predicted", 0)))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """``waves`` lists of bodies. Aggregate rates by wave, and every first-token time and gap of all of them."""
    target = Target("127.0.0.1", job["port"], tls=False)
    rates, first, gaps, tokens = [], [], [], []
    wall = cpu = 0.0
    for bodies in job["waves"]:
        cpu_before = time.process_time()
        answers = wave(target, job["path"], bodies, job["limit_s"])
        cpu += time.process_time() - cpu_before
        read = [pieces_of(answer) for answer in answers]
        seconds = max(answer.times[-1] for answer in answers) - min(answer.started for answer in answers)
        wall += seconds
        rates.append(sum(count for _, count in read) / seconds)
        for answer, (pieces, count) in zip(answers, read, strict=True):
            tokens.append(count)
            first.append(pieces[0] - answer.started)
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
