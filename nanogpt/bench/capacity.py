"""The highest rate of requests that a server answers within an objective, and settings that follow from it.

A trial is an open-loop run at one rate; it is met when at least the wanted share of all its requests (refused and
broken ones included) met every limit. The search:

1. The server alone: requests one after another. If these do not meet the objective, no rate does.
2. From the rate at which requests would just not overlap, the rate doubles until a trial fails.
3. Bisection (by ratio) between the highest met and the lowest failed rate, until they are within the tolerance.
4. Confirmation: the highest met rate is tried again with other arrivals and other prompts. Met again, it is the
   result. If not, that rate counts as failed, and the search goes on below it.

A failing trial ends as soon as its verdict is certain. Between trials the server is left until it is as quick again as
alone. What this cannot see: a limit that only longer runs meet (a cache that fills, a queue that grows very slowly).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nanogpt.bench.http import Pool
from nanogpt.bench.load import Plan, Progress, Run, run_load
from nanogpt.bench.measures import SLO, summary
from nanogpt.bench.prompts import Prompts, Server, Workload
from nanogpt.errors import NanoGPTError

_ALONE_REQUESTS = 8
_MIN_REQUESTS, _MAX_REQUESTS = 30, 20_000
_SETTLE_S = 30.0
_STEP_DOWN = 0.8


@dataclass(frozen=True)
class Search:
    """``attainment``: the share of requests that has to meet the objective. ``tolerance``: when bisection ends."""

    slo: SLO
    attainment: float = 0.99
    trial_s: float = 15.0
    tolerance: float = 0.1
    max_trials: int = 20
    clients: int = 10
    seed: int = 1


@dataclass(frozen=True)
class Trial:
    """One run at one rate. ``purpose``: double, bisect or confirm."""

    rate: float
    purpose: str
    met: bool
    attainment: float
    requests: int
    cut_short: bool
    figures: dict[str, Any]
    client: dict[str, Any]


@dataclass
class Capacity:
    """What was found. ``rate`` 0: no rate meets the objective; ``why`` tells how the search ended."""

    search: Search
    alone: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    rate: float = 0.0
    confirmed: bool = False
    why: str = ""

    @property
    def best(self) -> Trial | None:
        """The confirming trial of the result, which no search had chosen for its luck."""
        return next((t for t in reversed(self.trials) if t.met and t.rate == self.rate), None)

    def as_json(self) -> dict[str, Any]:
        return {
            "slo_ms": {name: limit * 1000 for name, limit in self.search.slo.limits.items()},
            "attainment": self.search.attainment,
            "rate": round(self.rate, 4),
            "confirmed": self.confirmed,
            "why": self.why,
            "alone": self.alone,
            "trials": [asdict(trial) for trial in self.trials],
            "recommended": recommend(self),
        }


Say = Callable[[str], None]
Show = Callable[[Progress], None]


async def find_capacity(
    pool: Pool, server: Server, workload: Workload, search: Search, *, say: Say, show: Show | None = None
) -> Capacity:
    """Raises: NanoGPTError when the server answers nothing even alone."""
    finder = _Finder(pool, server, workload, search, say, show)
    await finder.find()
    return finder.found


class _Finder:
    def __init__(
        self, pool: Pool, server: Server, workload: Workload, search: Search, say: Say, show: Show | None
    ) -> None:
        self._pool, self._server, self._workload, self._search = pool, server, workload, search
        self._say, self._show = say, show
        self.found = Capacity(search, {})

    async def find(self) -> None:
        search, found = self._search, self.found
        alone = await self._load(Plan(concurrency=1, requests=_ALONE_REQUESTS, warmup=2, seed=search.seed), 0)
        found.alone = summary(alone.outcomes, search.slo)
        if not found.alone["completed"]:
            kinds = ", ".join(found.alone["errors"])
            raise NanoGPTError(f"The server answered no request, one at a time: {kinds}.")
        self._say(f"alone: TTFT {_p50(found.alone, 'ttft_ms')}, ITL {_p50(found.alone, 'itl_ms')}")
        # Half of eight, not the wanted share: a single hiccup must not end the search before it has begun.
        if found.alone["goodput"]["attainment"] < 0.5:
            found.why = "One request at a time does not meet it either: no rate can."
            return
        low, high = await self._double(1000.0 / found.alone["e2e_ms"]["mean"])
        await self._narrow(low, high)

    async def _double(self, rate: float) -> tuple[float, float]:
        """The highest rate that was met, 0 if none was, and one that was not (infinite if none failed)."""
        low = 0.0
        while self._left() > 2:
            trial = await self._trial(rate, "double")
            if not trial.met:
                return low, rate
            low, rate = rate, rate * 2
        return low, math.inf

    async def _narrow(self, low: float, high: float) -> None:
        search, found = self._search, self.found
        met = [low] if low else []
        while self._left() > 0:
            if met and (high / met[-1] <= 1 + search.tolerance or self._left() == 1 or math.isinf(high)):
                trial = await self._trial(met[-1], "confirm")
                if trial.met:
                    found.rate, found.confirmed = met[-1], True
                    found.why = (
                        f"Met twice; {high:.3g} a second was not."
                        if high < math.inf
                        else "Met twice; the trials were used up before a rate failed, so it may be more."
                    )
                    return
                high = met.pop()
                while met and met[-1] >= high:
                    met.pop()
                continue
            trial = await self._trial(math.sqrt(met[-1] * high) if met else high / 2, "bisect")
            if trial.met:
                met.append(trial.rate)
            else:
                high = trial.rate
        found.rate = met[-1] if met else 0.0
        found.why = "The trials were used up before a rate was confirmed."

    async def _trial(self, rate: float, purpose: str) -> Trial:
        search = self._search
        number = len(self.found.trials) + 1
        requests = min(_MAX_REQUESTS, max(_MIN_REQUESTS, math.ceil(rate * search.trial_s)))
        await self._settle()
        plan = Plan(rate=rate, requests=requests, warmup=1, seed=search.seed + number)
        allowed = math.floor(requests * (1 - search.attainment) + 1e-9)

        def hopeless(progress: Progress) -> bool:
            return _certain_failures(progress, search.slo) > allowed

        run = await self._load(plan, number, hopeless)
        good = sum(outcome.meets(search.slo) for outcome in run.outcomes)
        met = not run.cut_short and good >= requests - allowed
        trial = Trial(
            rate, purpose, met, round(good / requests, 5), requests, run.cut_short,
            summary(run.outcomes, search.slo), run.client,
        )  # fmt: skip
        self.found.trials.append(trial)
        self._say(_told(trial))
        return trial

    async def _load(self, plan: Plan, number: int, give_up: Callable[[Progress], bool] | None = None) -> Run:
        """Each run has prompts of its own: none is in a cache because an earlier trial asked for it."""
        workload = replace(self._workload, seed=self._workload.seed + 1000 * number)
        return await run_load(self._pool, Prompts(workload, self._server), plan, show=self._show, give_up=give_up)

    async def _settle(self) -> None:
        """Until a request alone is about as quick as at first: what the last trial left has been worked off."""
        wanted_s = 2 * self.found.alone["ttft_ms"]["p90"] / 1000 + 0.01
        ends = time.monotonic() + _SETTLE_S
        prompts = Prompts(replace(self._workload, seed=-1 - len(self.found.trials)), self._server)
        index = 0
        while time.monotonic() < ends:
            answer = await self._pool.ask("POST", prompts.path, prompts.body(prompts.prompt(index), 1))
            index += 1
            if answer.status == 200 and not answer.failure and answer.ended - answer.started <= wanted_s:
                return
            await asyncio.sleep(0.2)

    def _left(self) -> int:
        return self._search.max_trials - len(self.found.trials)


def _certain_failures(progress: Progress, slo: SLO) -> int:
    """Requests that have failed for certain: ended ones, and open ones that are too late with their first byte."""
    failed = sum(not outcome.meets(slo) for outcome in progress.outcomes)
    limit = min(slo.limits.get("ttft", math.inf), slo.limits.get("e2e", math.inf))
    now = time.perf_counter()
    return failed + sum(not a.times and a.started > 0 and now - a.started > limit for a in progress.open.values())


def recommend(capacity: Capacity) -> dict[str, Any] | None:
    """Settings of this product's server that fit the capacity; ``why`` tells how each follows."""
    best = capacity.best
    if best is None:
        return None
    slo, rate = capacity.search.slo, capacity.rate
    peak = int(best.figures["peak_concurrency"])
    batch = max(1, 4 * math.ceil(peak / 4))
    alone_s = capacity.alone["ttft_ms"]["p50"] / 1000
    spare_s = max(0.0, slo.limits.get("ttft", slo.limits.get("e2e", 1.0)) - alone_s)
    queue = max(1, math.ceil(rate * spare_s))
    tokens_per_s = best.figures["output_tokens_per_s"]
    workers = max(1, min(8, math.ceil(tokens_per_s / TOKENS_PER_S_OF_A_WORKER)))
    a_minute = max(1, math.floor(0.8 * rate * 60 / capacity.search.clients))
    return {
        "NANOGPT_MAX_BATCH_SIZE": {
            "value": batch, "why": f"at {rate:.3g} requests a second at most {peak} were under way at once; more at"
            " once would be slower than the objective",
        },
        "NANOGPT_MAX_QUEUE": {
            "value": queue, "why": f"what waits longer than {spare_s * 1000:.0f} ms is late in any case: better refused"
            " at once (503), so that another server can take it",
        },
        "NANOGPT_HTTP_WORKERS": {
            "value": workers, "why": f"{tokens_per_s:,.0f} tokens a second were streamed; a worker streams about"
            f" {TOKENS_PER_S_OF_A_WORKER:,}",
        },
        "RATE_LIMIT": {
            "value": f"{a_minute} per minute", "why": f"80% of the capacity, shared by {capacity.search.clients}"
            " clients (--clients)",
        },
    }  # fmt: skip


TOKENS_PER_S_OF_A_WORKER = 2000
"""A rule of thumb: one worker of the embedded model's server, on a shared machine of two cores, streamed 1,700."""


def _p50(figures: dict[str, Any], name: str) -> str:
    return f"{figures[name]['p50']:.3g} ms" if figures[name] else "none"


def _told(trial: Trial) -> str:
    verdict = "met" if trial.met else "not met"
    share = f"{trial.attainment:.1%} within the limits" if not trial.cut_short else "given up early"
    return f"{trial.purpose:>7} {trial.rate:8.3f} requests/s: {verdict} ({share}, {trial.requests} requests)"
