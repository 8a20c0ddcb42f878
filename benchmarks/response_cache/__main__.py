"""What a repeated request costs: from the engine, from the worker's memory, from Redis, and with a Redis that hangs.

    python -m benchmarks.response_cache [--requests 200] [--tokens 100]

This product's server with two workers and the embedded model, one client on one connection, one request at a time. Four
rows: ``miss`` (each request is new), ``memory`` (each was asked before), ``redis`` (likewise, with no memory in the
workers, so that each answer comes from redis-server) and ``hung`` (as ``redis``, but it is stopped: all are computed).
Ends in one JSON line; the latencies are the client's, in milliseconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.http.servers import free_port
from nanogpt.web.redis_link import RedisLink

_ROOT = Path(__file__).parents[2]


@contextmanager
def serving(**environment: str) -> Iterator[http.client.HTTPConnection]:
    """A connection to a server with two workers; one connection is one worker."""
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", f"127.0.0.1:{port}", "web.serve:app"]
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("NANOGPT_", "REDIS_URL"))}
    process = subprocess.Popen(command, cwd=_ROOT, env={**keep, **environment}, stderr=subprocess.DEVNULL)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        until = time.monotonic() + 60
        while not _ready(connection):
            if time.monotonic() > until or process.poll() is not None:
                raise SystemExit("the server did not become ready")
            time.sleep(0.1)
        yield connection
        connection.close()
    finally:
        process.terminate()
        process.wait()


def _ready(connection: http.client.HTTPConnection) -> bool:
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        answer.read()
        return answer.status == 200
    except OSError:
        connection.close()
        return False


def ask(connection: http.client.HTTPConnection, seeds: range, tokens: int, expected: str) -> list[float]:
    """How long each request took, in ms; all of them have to be what was expected."""
    took = []
    for seed in seeds:
        body = json.dumps({"prompt": "ROMEO:", "max_length": tokens, "seed": seed})
        since = time.perf_counter()
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        took.append((time.perf_counter() - since) * 1000)
        if (answer.status, answer.headers["X-Cache"]) != (200, expected):
            raise SystemExit(f"{expected} was expected, not {answer.status} {answer.headers['X-Cache']}")
    return took


def figures(took: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(took, n=100)
    return {"median": round(cuts[49], 3), "p95": round(cuts[94], 3), "max": round(max(took), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.response_cache")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=100)
    options = parser.parse_args()
    seeds, warm = range(options.requests), range(-10, 0)
    rows: dict[str, dict[str, float]] = {}
    with serving() as connection:
        ask(connection, warm, options.tokens, "miss")
        rows["miss"] = figures(ask(connection, seeds, options.tokens, "miss"))
        rows["memory"] = figures(ask(connection, seeds, options.tokens, "hit"))
    redis_port = free_port()
    url = f"redis://127.0.0.1:{redis_port}/0"
    redis = subprocess.Popen(
        ["redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""], stdout=subprocess.DEVNULL
    )
    try:
        with serving(REDIS_URL=url, NANOGPT_CACHE_BYTES="0") as connection:
            ask(connection, warm, options.tokens, "miss")
            ask(connection, seeds, options.tokens, "miss")
            rows["redis"] = figures(ask(connection, seeds, options.tokens, "hit"))
            link = RedisLink(url)
            link.set("nanogpt:benchmark", bytes(2 * options.tokens), 60)
            busy_s = link.busy_s
            for _ in seeds:
                link.get("nanogpt:benchmark", 262_144)
            rows["redis"]["in_redis"] = round((link.busy_s - busy_s) / len(seeds) * 1000, 3)
            link.close()
            redis.send_signal(signal.SIGSTOP)
            rows["hung"] = figures(ask(connection, seeds, options.tokens, "miss"))
    finally:
        redis.kill()
        redis.wait()
    for name, row in rows.items():
        print(f"{name:8}", *(f"{what} {value:8.3f} ms" for what, value in row.items()))
    about = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"benchmark": "response_cache", **vars(options), **about, "ms": rows}))


if __name__ == "__main__":
    main()
