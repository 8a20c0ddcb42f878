"""Ten times more requests than the server can answer: what it still answers, and how fast it refuses the rest.

Capacity is measured first, with as many clients as the engine computes at once, each sending its next request when the
last one is answered. Then requests come at random times (Poisson), ten times as many a second, whether or not the
server keeps up.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.client import Cut, ask
from benchmarks.soak.run import free_port
from benchmarks.soak.server import Server

TIMES = 10
CLIENTS = 32
NEW_TOKENS = 128
WARM_UP_S = 3.0
ROUNDS = 5


@dataclass
class Seen:
    """When answers came, and how long refusals took."""

    answered_at: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


async def _one(port: int, seen: Seen) -> None:
    body = json.dumps({"prompt": "To be", "max_length": NEW_TOKENS}).encode()
    sent = time.monotonic()
    try:
        async with ask(port, "POST", "/generate", body) as answer:
            await answer.body()
            now = time.monotonic()
    except (Cut, OSError) as error:
        seen.other.append(type(error).__name__)
        return
    if answer.status == 200:
        seen.answered_at.append(now)
        seen.answered_s.append(now - sent)
    elif answer.status in (429, 503):
        seen.refused_s.append(now - sent)
    else:
        seen.other.append(str(answer.status))


async def _closed(port: int, seconds: float) -> float:
    """Answers a second, with as many clients as there are places."""
    seen = Seen()
    until = time.monotonic() + WARM_UP_S + seconds

    async def client() -> None:
        while time.monotonic() < until:
            await _one(port, seen)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sum(until - seconds <= at < until for at in seen.answered_at) / seconds


async def _open(port: int, rate: float, seconds: float, seed: int) -> tuple[Seen, float]:
    """Requests at random times. Returns what was seen, and answers a second while they came."""
    seen, draw, tasks = Seen(), random.Random(seed), []
    start = time.monotonic()
    due = start
    while due < start + WARM_UP_S + seconds:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(_one(port, seen)))
    ended = time.monotonic()
    goodput = sum(ended - seconds <= at < ended for at in seen.answered_at) / seconds
    await asyncio.gather(*tasks)
    return seen, goodput


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
            capacity = asyncio.run(_closed(port, seconds))
            seen, goodput = asyncio.run(_open(port, TIMES * capacity, seconds, seed + number))
            rounds.append({
                "capacity": round(capacity, 2), "goodput": round(goodput, 2), "share": round(goodput / capacity, 3),
                "refused": len(seen.refused_s), "answered": len(seen.answered_at),
                "refused_ms": _percentiles(seen.refused_s), "answered_ms": _percentiles(seen.answered_s),
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
            f" anything else: {len(at['other'])}"
        )
    shares = [at["share"] for at in result["rounds"]]
    print(f"goodput, median: {statistics.median(shares):.0%} of capacity ({min(shares):.0%} to {max(shares):.0%})")
    print(json.dumps(result))
    return 1 if statistics.median(shares) < 0.9 or any(at["other"] for at in result["rounds"]) else 0
