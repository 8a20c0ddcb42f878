"""The load: when each request is sent, and what became of it. One asyncio loop.

Closed loop: C clients, each sends its next request when its answer has ended. Open loop: requests come at moments of
a Poisson process that was drawn before (by the seed), whatever the server does meanwhile; so a slow server meets a
queue, as it does in life. Latencies count from the moment of sending; how late that was is measured too.

The loop watches itself: a timer that wakes late shows that arrival times are stamped late as well.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanogpt.bench.http import Answer, Pool
from nanogpt.bench.measures import Outcome, distribution, quantile
from nanogpt.bench.prompts import Prompts
from nanogpt.bench.stream import read_answer
from nanogpt.errors import InvalidRequest

TICK_S = 0.02
NOT_SENT = "not sent"
# What makes the client's own figures doubtful.
MAX_LAG_S = 0.010
MAX_CPU_SHARE = 0.8


@dataclass(frozen=True)
class Plan:
    """How requests are sent: ``rate`` a second (open loop) or ``concurrency`` clients (closed loop), not both.

    It ends after ``requests``, or sends none after ``duration_s``; those under way are waited for.
    """

    rate: float = 0.0
    concurrency: int = 0
    requests: int = 0
    duration_s: float = 0.0
    warmup: int = 0
    max_open: int = 1024
    seed: int = 1

    def __post_init__(self) -> None:
        if bool(self.rate) == bool(self.concurrency):
            raise InvalidRequest("Give --rate or --concurrency, one of them.", field="rate")
        if bool(self.requests) == bool(self.duration_s):
            raise InvalidRequest("Give --requests or --duration, one of them.", field="requests")


@dataclass
class Progress:
    """How a run stands, for displays and for whoever may end it early."""

    plan: Plan
    began: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    open: dict[int, Answer] = field(default_factory=dict)
    events: int = 0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began


@dataclass(frozen=True)
class Run:
    """What a run showed. ``client`` tells what the load generator itself cost, and whether it was in the way."""

    outcomes: list[Outcome]
    client: dict[str, Any]
    cut_short: bool = False


def arrivals(rate: float, seed: int, *, requests: int = 0, duration_s: float = 0.0) -> list[float]:
    """Seconds from the run's begin at which requests are due: exponential gaps, the same ones for the same seed."""
    draw = random.Random(f"arrivals {seed}")  # noqa: S311 (it has to repeat)
    times: list[float] = []
    at = 0.0
    while True:
        at += draw.expovariate(rate)
        if (requests and len(times) == requests) or (duration_s and at >= duration_s):
            return times
        times.append(at)


Watcher = Callable[[Progress], bool]


async def run_load(
    pool: Pool, prompts: Prompts, plan: Plan, *, show: Callable[[Progress], None] | None = None,
    give_up: Watcher | None = None,
) -> Run:  # fmt: skip
    """Send the plan's requests. ``give_up`` is asked now and then: True ends the run, its open requests are left."""
    load = _Load(pool, prompts, plan)
    for index in range(plan.warmup):
        await load.warm_up(index)
    gc.collect()
    gc.freeze()  # what is there stays: a collection of all of it would hold up the loop
    try:
        return await load.run(show, give_up)
    finally:
        gc.unfreeze()


class _Load:
    def __init__(self, pool: Pool, prompts: Prompts, plan: Plan) -> None:
        self._pool, self._prompts, self._plan = pool, prompts, plan
        self._progress = Progress(plan)
        self._lags = array("d")
        self._next = 0

    async def warm_up(self, index: int) -> None:
        """One request that does not count; its prompt is none of the run's."""
        await self._pool.exchange(self._bytes(-1 - index), Answer())

    async def run(self, show: Callable[[Progress], None] | None, give_up: Watcher | None) -> Run:
        progress, plan = self._progress, self._plan
        events_before = self._pool.events
        cpu_before = time.process_time()
        progress.began = time.perf_counter()
        sending = asyncio.ensure_future(self._open_loop() if plan.rate else self._closed_loop())
        watching = asyncio.ensure_future(self._watch_itself())
        cut_short = False
        try:
            while not sending.done():
                await asyncio.wait({sending}, timeout=0.25)
                progress.events = self._pool.events - events_before
                if show is not None:
                    show(progress)
                if give_up is not None and give_up(progress):
                    cut_short = True
                    break
            if not cut_short:
                sending.result()
        finally:
            sending.cancel()
            watching.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
        cpu_s = time.process_time() - cpu_before
        return Run(progress.outcomes, self._about_itself(cpu_s, progress.elapsed_s), cut_short)

    async def _closed_loop(self) -> None:
        plan = self._plan
        ends = self._progress.began + plan.duration_s if plan.duration_s else float("inf")

        async def client() -> None:
            while time.perf_counter() < ends and (not plan.requests or self._next < plan.requests):
                index, self._next = self._next, self._next + 1
                outcome = await self._ask(index, time.perf_counter())
                if outcome.failure and outcome.e2e_s < 0.1:
                    await asyncio.sleep(0.1)  # a server that refuses at once is not asked ten thousand times a second

        await _all([client() for _ in range(plan.concurrency)])

    async def _open_loop(self) -> None:
        plan, progress = self._plan, self._progress
        due = arrivals(plan.rate, plan.seed, requests=plan.requests, duration_s=plan.duration_s)
        running: set[asyncio.Task[Outcome]] = set()
        try:
            for index, at in enumerate(due):
                planned = progress.began + at
                if (wait := planned - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                if len(running) >= plan.max_open:
                    progress.outcomes.append(Outcome(progress.elapsed_s, 0.0, 0.0, failure=NOT_SENT))
                    continue
                task = asyncio.create_task(self._ask(index, planned))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()

    async def _ask(self, index: int, planned: float) -> Outcome:
        answer = Answer()
        self._progress.open[index] = answer
        try:
            await self._pool.exchange(self._bytes(index), answer)
        finally:
            del self._progress.open[index]
        outcome = read_answer(answer, began=self._progress.began, planned=planned)
        self._progress.outcomes.append(outcome)
        return outcome

    def _bytes(self, index: int) -> bytes:
        return self._pool.post(self._prompts.path, self._prompts.request(index))

    async def _watch_itself(self) -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self._lags.append(max(0.0, time.perf_counter() - due))

    def _about_itself(self, cpu_s: float, wall_s: float) -> dict[str, Any]:
        tokens = sum(outcome.output_tokens for outcome in self._progress.outcomes)
        lags = sorted(self._lags)
        late = sorted(outcome.late_s for outcome in self._progress.outcomes) if self._plan.rate else []
        lag_s = quantile(lags, 0.99) if lags else 0.0
        share = cpu_s / wall_s if wall_s else 0.0
        return {
            "cpu_share": round(share, 4),
            "cpu_us_per_token": round(cpu_s / tokens * 1e6, 2) if tokens else None,
            "loop_lag_ms": distribution(lags),
            "late_ms": distribution(late),
            "warning": _warning(share, lag_s, quantile(late, 0.99) if late else 0.0),
        }


def _warning(share: float, lag_s: float, late_s: float) -> str | None:
    """Why the figures are the client's as much as the server's, if they are."""
    if share > MAX_CPU_SHARE:
        return (
            f"The load generator itself was the bottleneck: it used {share:.0%} of a processor. Server figures may be"
            " better than these; use several clients, or fewer, longer requests."
        )
    worst = max(lag_s, late_s)
    if worst > MAX_LAG_S:
        return (
            f"The load generator was kept waiting for a processor (its event loop ran up to {worst * 1000:.0f} ms late,"
            f" at p99, while it used {share:.0%} of one): latencies are too high by up to as much. Run it on another"
            " machine than the server, or on one with processors to spare."
        )
    return None


async def _all(coroutines: list[Any]) -> None:
    """Run them together; where one fails, none goes on."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
