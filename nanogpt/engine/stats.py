"""What an engine has done since it started, and what it holds: the numbers behind ``/metrics``. Owned by the loop.

They must cost next to nothing: a step of a small model takes 0.3 ms. So these are plain counters and histograms with
fixed buckets, a step is observed once for all of its sequences, and whatever has to be summed up is summed up when
somebody asks (``Engine.stats``), a few times a second. Knows no NumPy: HTTP workers read the same buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

# Seconds. Models range from 0.2 ms a token (a small one on a CPU) to a second (a large one under load).
LATENCY_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WAITING_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts of values by bucket, and their sum. A bucket holds what is at most its bound; the last one, the rest."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)


def _finished() -> dict[str, int]:
    return dict.fromkeys(("stop", "length", "abort", "error"), 0)


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, unless they say "now". Units: tokens, sequences, slots; seconds in the histograms."""

    num_running: int = 0
    """Sequences now."""
    num_waiting: int = 0
    """Sequences now."""
    num_slots: int = 0
    num_slots_running: int = 0
    """Now: slots that sequences own."""
    num_slots_cached: int = 0
    """Now: slots that keep a finished sequence's K and V."""
    num_positions: int = 0
    """Positions that all slots hold together."""
    num_positions_held: int = 0
    """Now: positions with K and V of use."""
    num_steps: int = 0
    num_computed_tokens: int = 0
    num_prompt_tokens: int = 0
    """Of admitted requests."""
    num_output_tokens: int = 0
    num_queried_tokens: int = 0
    """Prompt tokens that the prefix cache was asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens that it had."""
    num_guessed_tokens: int = 0
    """Speculation: guesses that were computed."""
    num_accepted_tokens: int = 0
    """Guesses that the runner drew, too."""
    num_queue_full: int = 0
    finished: dict[str, int] = field(default_factory=_finished)
    queue: Histogram = field(default_factory=partial(Histogram, WAITING_S))
    ttft: Histogram = field(default_factory=partial(Histogram, REQUEST_S))
    itl: Histogram = field(default_factory=partial(Histogram, LATENCY_S))
    e2e: Histogram = field(default_factory=partial(Histogram, REQUEST_S))
    step: Histogram = field(default_factory=partial(Histogram, LATENCY_S))
    step_sequences: Histogram = field(default_factory=partial(Histogram, SEQUENCES))
    step_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    prompt_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    output_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))

    def to_wire(self) -> dict[str, Any]:
        """Plain data, a copy. A histogram is its counts, followed by its sum."""
        values: dict[str, Any] = {}
        for name in _NAMES:
            value = getattr(self, name)
            if isinstance(value, Histogram):
                value = [*value.counts, value.sum]
            values[name] = dict(value) if isinstance(value, dict) else value
        return values


_NAMES = tuple(f.name for f in fields(EngineStats))
BOUNDS = {name: value.bounds for name in _NAMES if isinstance(value := getattr(EngineStats(), name), Histogram)}
"""The buckets of each histogram, by its name in ``EngineStats``."""
