"""One soak: the server and Redis are started, loaded and harmed; then what they hold is compared with before.

Used by ``python -m benchmarks.soak`` (ten minutes) and by ``tests/faults`` (seconds).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.soak.client import Account, Client, Cut, ask, gigabyte, slowloris
from benchmarks.soak.server import Held, Server, wait_for

KEY, ADMIN_KEY = "soak-key", "soak-admin-key"
# What each process may hold more at the end than at the start: caches of allocators, a thread's stack, a log's buffer;
# a worker's connection to an engine that stands by.
_MORE_MEMORY_BYTES = {"engine": 48 << 20, "worker": 24 << 20, "supervisor": 8 << 20, "arbiter": 8 << 20}
_MORE_DESCRIPTORS = 3
_SLOWLORIS_CONNECTIONS = 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Redis:
    """A Redis of this soak's own; None-like where there is no redis-server."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir",
                   str(self._folder), "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", self.port)) == 0

        wait_for(answers, "Redis listens", self._process.poll)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


FAULTS = ("engine_killed", "reloaded", "redis_stopped", "worker_killed", "rolled_back", "gigabyte_body",
          "workers_renewed", "reload_refused")  # fmt: skip
"""The methods of ``Faults``, in the order of their first turn; later turns are in random order."""


class Faults:
    """What is done to the server while it works. Each leaves it able to recover by itself."""

    def __init__(self, server: Server, redis: Redis, account: Account, other: str) -> None:
        self._server, self._redis, self._account, self._other = server, redis, account, other
        self.done: list[str] = []

    async def engine_killed(self) -> None:
        self._server.kill("engine")

    async def worker_killed(self) -> None:
        self._account.last_cut = time.monotonic()
        self._server.kill("worker")

    async def redis_stopped(self) -> None:
        self._redis.stop()
        await asyncio.sleep(2.0)
        await asyncio.to_thread(self._redis.start)

    async def workers_renewed(self) -> None:
        os.kill(self._server.pids("arbiter")[0], signal.SIGHUP)

    async def reloaded(self) -> None:
        await self._admin("/admin/reload", {"checkpoint": self._other}, {200})

    async def rolled_back(self) -> None:
        await self._admin("/admin/rollback", {}, {200})

    async def reload_refused(self) -> None:
        await self._admin("/admin/reload", {"checkpoint": "/nowhere/model.pt"}, {400, 404, 409, 422})

    async def gigabyte_body(self) -> None:
        await gigabyte(self._account)

    async def _admin(self, path: str, body: dict[str, Any], wanted: set[int]) -> None:
        content = json.dumps(body).encode()
        async with ask(self._server.port, "POST", path, content, X_API_Key=ADMIN_KEY) as answer:
            said = (await answer.body()).decode()
            # An engine that was just killed is no engine to reload beside: that is said, and tried again next time.
            if answer.status not in wanted | {503}:
                self._account.violation(f"{path} was answered {answer.status}: {said}")
            self._account.ends[f"{path}: {answer.status}"] += 1

    async def run(self, every_s: float, until: float, seed: int) -> None:
        draw = random.Random(seed)
        waiting = list(reversed(FAULTS))
        while time.monotonic() + every_s < until:
            await asyncio.sleep(every_s)
            if not waiting:
                waiting = list(FAULTS)
                draw.shuffle(waiting)
            name = waiting.pop()
            began = time.monotonic()
            fault: Callable[[], Awaitable[None]] = getattr(self, name)
            try:
                await asyncio.wait_for(fault(), 60.0)
            except Cut:
                if not self._account.may_be_cut(began):
                    self._account.violation(f"{name}: the connection was cut")
            except TimeoutError:
                self._account.violation(f"{name} took more than 60 s")
            self.done.append(name)


def soak(
    folder: Path, *, seconds: float, workers: int, clients: int, fault_every_s: float, checkpoint: str, other: str,
    seed: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Load and faults for so long. The result's ``violations`` lists what must not happen; empty is good."""
    if shutil.which("redis-server") is None:
        raise SystemExit("redis-server is not installed.")
    redis = Redis(folder)
    port = free_port()
    environment = {
        "MODEL_CHECKPOINT": checkpoint, "API_KEY": KEY, "ADMIN_KEY": ADMIN_KEY, "RATE_LIMIT": "off",
        "REDIS_URL": f"redis://127.0.0.1:{redis.port}/0", "NANOGPT_RUN_DIR": str(folder / "run"),
        "NANOGPT_CONTEXT_OVERFLOW": "crop", "NANOGPT_LOG_LEVEL": "warning",
    }  # fmt: skip
    server = Server(port, workers, environment, folder / "log")
    account = Account(port, KEY)
    try:
        server.wait_ready()
        # The first load fills what fills once: threads, connections, allocators, caches.
        asyncio.run(_load(account, min(10.0, seconds / 4), clients, seed, None, fault_every_s))
        before = _at_rest(server)
        warm_up, account.tokens = account.ends.total(), 0
        faults = Faults(server, redis, account, other)
        started = time.monotonic()
        asyncio.run(_load(account, seconds, clients, seed + 1, faults, fault_every_s))
        took = time.monotonic() - started
        if "rolled_back" in faults.done or "reloaded" in faults.done:
            asyncio.run(faults.rolled_back())
        wait_for(lambda: server.status("/ready") == 200, "the server is ready after all of it")
        after = _at_rest(server)
        _compare(account, before, after)
        if server.stop():
            account.violation("the exit code after SIGTERM was not 0")
        log = server.log.read_text(errors="replace")
        if "Traceback" in log:
            account.violation("a traceback in the log: " + log[log.index("Traceback") :][:2000])
        if KEY in log or ADMIN_KEY in log:
            account.violation("a key in the log")
    finally:
        server.stop()
        redis.stop()
    return {
        "benchmark": "soak", "seconds": round(took, 1), "workers": workers, "clients": clients,
        "requests": account.ends.total() - warm_up, "tokens_per_second": round(account.tokens / took, 1),
        "faults": faults.done, "ends": dict(account.ends.most_common()), "refused_ms_p99": _p99_ms(account.refused_s),
        "before": {role: vars(held) for role, held in before.items()},
        "after": {role: vars(held) for role, held in after.items()}, "violations": account.violations,
    }  # fmt: skip


async def _load(
    account: Account, seconds: float, clients: int, seed: int, faults: Faults | None, every_s: float
) -> None:
    until = time.monotonic() + seconds
    tasks = [Client(account, seed * 1000 + i, until).run() for i in range(clients)]
    if faults is not None:
        tasks += [faults.run(every_s, until, seed), slowloris(account, until, _SLOWLORIS_CONNECTIONS)]
    await asyncio.gather(*tasks)


def _at_rest(server: Server) -> dict[str, Held]:
    """What the server holds once it holds no more than a moment before, and all its processes are there."""
    last: dict[str, Held] = {}

    def settled() -> bool:
        nonlocal last
        held = server.held()
        same = {role: h.descriptors for role, h in held.items()} == {role: h.descriptors for role, h in last.items()}
        last = held
        time.sleep(1.0)
        return same

    wait_for(settled, "the server comes to rest")
    return last


def _compare(account: Account, before: dict[str, Held], after: dict[str, Held]) -> None:
    """A process of each role against one before: after a reload there are two engines, and that is as it should be."""
    for role, held in after.items():
        was = before[role]
        memory, memory_was = held.memory_bytes // held.processes, was.memory_bytes // was.processes
        if memory > memory_was + _MORE_MEMORY_BYTES[role]:
            account.violation(f"memory of one {role} grew from {memory_was:,} to {memory:,} bytes")
        if held.descriptors / held.processes > was.descriptors / was.processes + _MORE_DESCRIPTORS:
            account.violation(f"descriptors of all {role}s grew from {was} to {held}")


def _p99_ms(values: list[float]) -> float | None:
    return round(sorted(values)[int(len(values) * 0.99)] * 1000, 1) if values else None


def report(result: dict[str, Any]) -> None:
    """A table for people, then one line of JSON."""
    print(f"{result['requests']:,} requests in {result['seconds']:g} s, {result['tokens_per_second']:,} tokens/s")
    for end, count in result["ends"].items():
        print(f"  {count:>7,}  {end}")
    print(f"faults: {', '.join(result['faults'])}")
    print(f"{'':<12}{'processes':>9}{'after':>6}{'memory before':>15}{'after':>15}{'descriptors':>13}{'after':>7}")
    for role, held in result["before"].items():
        now = result["after"][role]
        print(f"{role:<12}{held['processes']:>9}{now['processes']:>6}{held['memory_bytes']:>15,}{now['memory_bytes']:>15,}"
              f"{held['descriptors']:>13}{now['descriptors']:>7}")  # fmt: skip
    print("\n".join(f"VIOLATION: {what}" for what in result["violations"]) or "No violation.")
    print(json.dumps(result))
