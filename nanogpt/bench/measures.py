"""What is measured, defined once. Pure arithmetic on what each request showed; no clock, no sockets.

All times are the client's, from the moment before it looks for a connection, so a new connection is part of them.

TTFT   time to first token: until the first event that carries text has come.
ITL    inter-token latency: the time between two events of a stream that carry text, each gap a value of its own
       over all streams. A server that sends two tokens in an event shows one gap for both.
TPOT   time per output token of a request: (time of its last text - time of its first) / (its output tokens - 1).
       Requests of one token have none. guidellm calls this ITL.
E2E    until the answer is complete, its end (``[DONE]``) included.

Output tokens are what the server's usage says, else the events with text. Rates are over the time from the first
request sent to the last answer complete, finished requests alone. Errors have no times, they are counted by kind.

Goodput: requests a second that ended well within every limit of the objective (SLO). Of one request, ``itl`` is the
mean of its gaps. Attainment: the share of all requests, failed ones included, that did. (DistServe, section 2.2.)
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanogpt.errors import InvalidRequest

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
SLO_NAMES = ("ttft", "itl", "tpot", "e2e")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(slots=True)
class Outcome:
    """One request, after its end. Seconds; ``sent_s`` from the run's begin, ``late_s`` behind its schedule."""

    sent_s: float
    late_s: float
    e2e_s: float
    failure: str = ""
    """Empty, or the kind of error: ``429 rate_limited``, ``cut``, ``timeout``, ``connect``, ``stream: engine_died``."""
    ttft_s: float | None = None
    generation_s: float = 0.0
    """From the first text to the last."""
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def tpot_s(self) -> float | None:
        return self.generation_s / (self.output_tokens - 1) if self.output_tokens > 1 and self.gaps_s else None

    @property
    def itl_s(self) -> float | None:
        """The mean of this request's gaps."""
        return self.generation_s / len(self.gaps_s) if self.gaps_s else None

    def meets(self, slo: SLO) -> bool:
        if self.failure or self.ttft_s is None:
            return False
        values = {"ttft": self.ttft_s, "itl": self.itl_s, "tpot": self.tpot_s, "e2e": self.e2e_s}
        # A text of one token has no gaps, and none that are too long.
        return all((values[name] or 0.0) <= limit for name, limit in slo.limits.items())


@dataclass(frozen=True)
class SLO:
    """Upper limits in seconds by name (``SLO_NAMES``)."""

    limits: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> SLO:
        """``ttft=200ms,itl=50ms``. Raises: InvalidRequest."""
        limits: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            match = re.fullmatch(r"(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*(us|ms|s)", part)
            if match is None or match[1] not in SLO_NAMES or float(match[2]) == 0:
                raise InvalidRequest(
                    f"--slo has {part!r}; a limit is one of {', '.join(SLO_NAMES)}, then =, a number above 0"
                    " and us, ms or s.",
                    remedy="For example --slo ttft=200ms,itl=50ms.",
                    field="slo",
                )
            limits[match[1]] = float(match[2]) * _UNITS[match[3]]
        if not limits:
            raise InvalidRequest("--slo is empty.", remedy="For example --slo ttft=200ms,itl=50ms.", field="slo")
        return cls(limits)

    def __str__(self) -> str:
        return ", ".join(f"{name} ≤ {milliseconds(limit)}" for name, limit in self.limits.items())


def milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, interpolated between neighbours (NumPy's and vLLM's ``linear``)."""
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Iterable[float], scale: float = 1000.0) -> dict[str, float] | None:
    """Mean, quantiles and the largest, times ``scale`` (seconds to milliseconds); None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    found = {"mean": math.fsum(ordered) / len(ordered)}
    found |= {name: quantile(ordered, share) for name, share in QUANTILES.items()}
    found["max"] = ordered[-1]
    return {name: round(value * scale, 4) for name, value in found.items()}


def summary(outcomes: Sequence[Outcome], slo: SLO | None = None) -> dict[str, Any]:
    """The figures of a run, as the JSON report has them. Times in milliseconds, rates a second."""
    done = [outcome for outcome in outcomes if not outcome.failure]
    first = min((outcome.sent_s for outcome in outcomes), default=0.0)
    last = max((outcome.sent_s + outcome.e2e_s for outcome in outcomes), default=0.0)
    seconds = max(last - first, 1e-9)
    prompt_tokens = sum(outcome.prompt_tokens for outcome in done)
    output_tokens = sum(outcome.output_tokens for outcome in done)
    figures: dict[str, Any] = {
        "requests": len(outcomes),
        "completed": len(done),
        "errors": dict(Counter(outcome.failure for outcome in outcomes if outcome.failure).most_common()),
        "duration_s": round(seconds, 4),
        "requests_per_s": round(len(done) / seconds, 4),
        "output_tokens_per_s": round(output_tokens / seconds, 3),
        "total_tokens_per_s": round((prompt_tokens + output_tokens) / seconds, 3),
        "prompt_tokens": distribution((outcome.prompt_tokens for outcome in done), 1.0),
        "output_tokens": distribution((outcome.output_tokens for outcome in done), 1.0),
        "ttft_ms": distribution(outcome.ttft_s for outcome in done if outcome.ttft_s is not None),
        "itl_ms": distribution(gap for outcome in done for gap in outcome.gaps_s),
        "tpot_ms": distribution(outcome.tpot_s for outcome in done if outcome.tpot_s is not None),
        "e2e_ms": distribution(outcome.e2e_s for outcome in done),
        "mean_concurrency": round(math.fsum(outcome.e2e_s for outcome in outcomes) / seconds, 3),
        "peak_concurrency": peak_concurrency(outcomes),
    }
    if slo is not None:
        good = sum(outcome.meets(slo) for outcome in outcomes)
        figures["goodput"] = {
            "slo_ms": {name: limit * 1000 for name, limit in slo.limits.items()},
            "requests_per_s": round(good / seconds, 4),
            "attainment": round(good / len(outcomes), 5) if outcomes else 0.0,
        }
    return figures


def peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were under way at once."""
    changes = [(outcome.sent_s, 1) for outcome in outcomes]
    changes += [(outcome.sent_s + outcome.e2e_s, -1) for outcome in outcomes]
    running = peak = 0
    for _, change in sorted(changes):
        running += change
        peak = max(peak, running)
    return peak


def per_second(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Second by second: requests under way in its middle, output tokens that came, requests that ended, errors."""
    if not outcomes:
        return []
    length = int(max(outcome.sent_s + outcome.e2e_s for outcome in outcomes)) + 1
    rows = [{"running": 0.0, "tokens": 0.0, "completed": 0.0, "failed": 0.0} for _ in range(length)]
    for outcome in outcomes:
        end = outcome.sent_s + outcome.e2e_s
        rows[int(end)]["failed" if outcome.failure else "completed"] += 1
        for second in range(math.ceil(outcome.sent_s - 0.5), math.floor(end - 0.5) + 1):
            rows[second]["running"] += 1
        if outcome.ttft_s is not None:
            at = outcome.sent_s + outcome.ttft_s
            each = outcome.output_tokens / (len(outcome.gaps_s) + 1)
            rows[min(int(at), length - 1)]["tokens"] += each
            for gap in outcome.gaps_s:
                at += gap
                rows[min(int(at), length - 1)]["tokens"] += each
    return rows
