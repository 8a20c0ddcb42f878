"""Moving windows: how much a client has taken within the last minute (or hour), counted exactly.

An amount counts from the moment it is taken until it *leaves*, ``period_s`` later; what would go above the limit is
refused and counts nothing. An amount may be *held*: taken in full beforehand, because how much will be used is known
only at the end. It counts in full as long as it is held and, once settled, what was used counts for ``period_s`` more.
So within any ``period_s`` no more can be used than the limit. The hold of somebody who dies leaves ``period_s`` after
its own deadline.

Plain data and a clock; used by one thread. ``ledger`` puts it behind a socket, ``nanogpt.web.redis_windows`` says the
same in Redis' own language.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MAX_WINDOWS = 20_000
"""Past this many, the window that was used the longest ago is forgotten: memory is bounded, whoever comes."""
MAX_ENTRIES = 1024
"""Limits up to this many are kept entry by entry; of larger ones, amounts leave up to period_s / 1024 late."""
UNKNOWN_RETRY_S = 1.0
"""Retry-After when it depends on how soon somebody gives back what is held."""


@dataclass(frozen=True)
class Rule:
    """At most ``limit`` of what ``kind`` names (``requests``, ``tokens``) within any ``period_s`` seconds."""

    kind: str
    limit: int
    period_s: int


class State(NamedTuple):
    """A rule after a taking. ``reset_s``: until the oldest amount leaves. ``retry_after_s``: 0 where it admitted."""

    remaining: int
    reset_s: float
    retry_after_s: float


class Taken(NamedTuple):
    """Whether all rules admitted the amount (else none counts it), and how each one stands."""

    admitted: bool
    states: list[State]


class Counters(Protocol):
    """Who counts: this process, the host's ledger, or Redis."""

    def take(
        self, client: str, rules: Sequence[Rule], amount: int = 1, *, hold: str = "", hold_s: float = 0.0
    ) -> Taken:
        """Take the amount from every rule, or from none. With ``hold``, a name for it, until settled."""

    def settle(self, client: str, rules: Sequence[Rule], hold: str, used: int) -> None:
        """End what is held: of it, so much was used. An unknown hold is no error: it has lapsed."""


class Windows:
    """Counters in this process's memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: OrderedDict[tuple[str, str, int], _Window] = OrderedDict()

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    def take(
        self, client: str, rules: Sequence[Rule], amount: int = 1, *, hold: str = "", hold_s: float = 0.0
    ) -> Taken:
        now = self._clock()
        windows = [self._window(client, rule) for rule in rules]
        for window in windows:
            window.lapse(now)
        admitted = all(window.total + amount <= rule.limit for rule, window in zip(rules, windows, strict=True))
        states = []
        for rule, window in zip(rules, windows, strict=True):
            retry_after_s = window.retry_after_s(rule.limit - amount, now)
            if admitted and hold:
                window.hold(hold, amount, now + hold_s + rule.period_s)
            elif admitted:
                window.add(amount, _leaves_at(rule, now))
            states.append(State(max(0, rule.limit - window.total), window.reset_s(now), retry_after_s))
        self._forget(now)
        return Taken(admitted, states)

    def settle(self, client: str, rules: Sequence[Rule], hold: str, used: int) -> None:
        now = self._clock()
        for rule in rules:
            window = self._windows.get((client, rule.kind, rule.period_s))
            if window is not None:
                window.lapse(now)
                window.settle(hold, used, _leaves_at(rule, now))

    def _window(self, client: str, rule: Rule) -> _Window:
        """By kind and period, without the limit: one that is changed goes on with what was counted."""
        key = (client, rule.kind, rule.period_s)
        window = self._windows.setdefault(key, _Window())
        self._windows.move_to_end(key)
        return window

    def _forget(self, now: float) -> None:
        """Two of the oldest at a time, so that no request pays for the many before it."""
        for key in list(itertools.islice(self._windows, 2)):
            window = self._windows[key]
            window.lapse(now)
            if window.total and len(self._windows) <= MAX_WINDOWS:
                return
            del self._windows[key]


class _Window:
    """One client's amounts under one rule, each with the moment at which it leaves."""

    __slots__ = ("entries", "held", "total")

    def __init__(self) -> None:
        self.entries: deque[tuple[float, int]] = deque()
        self.held: dict[str, tuple[float, int]] = {}
        self.total = 0

    def lapse(self, now: float) -> None:
        while self.entries and self.entries[0][0] <= now:
            self.total -= self.entries.popleft()[1]
        while self.held:
            name, (leaves_at, amount) = next(iter(self.held.items()))
            if leaves_at > now:
                break
            del self.held[name]
            self.total -= amount

    def add(self, amount: int, leaves_at: float) -> None:
        if not amount:
            return
        self.total += amount
        if self.entries and self.entries[-1][0] == leaves_at:
            amount += self.entries.pop()[1]
        self.entries.append((leaves_at, amount))

    def hold(self, name: str, amount: int, leaves_at: float) -> None:
        self.total += amount
        self.held[name] = (leaves_at, amount)

    def settle(self, name: str, used: int, leaves_at: float) -> None:
        if name in self.held:
            _, amount = self.held.pop(name)
            self.total -= amount
            self.add(min(max(used, 0), amount), leaves_at)

    def reset_s(self, now: float) -> float:
        return self.entries[0][0] - now if self.entries else UNKNOWN_RETRY_S if self.held else 0.0

    def retry_after_s(self, admits: int, now: float) -> float:
        """How long until no more than so many are counted."""
        excess = self.total - admits
        return _until_gone(excess, self.entries, now) if excess > 0 else 0.0


def _leaves_at(rule: Rule, now: float) -> float:
    if rule.limit <= MAX_ENTRIES:
        return now + rule.period_s
    quantum = rule.period_s / MAX_ENTRIES
    return math.ceil((now + rule.period_s) / quantum) * quantum


def _until_gone(excess: int, entries: Iterable[tuple[float, int]], now: float) -> float:
    for leaves_at, amount in entries:
        excess -= amount
        if excess <= 0:
            return leaves_at - now
    return UNKNOWN_RETRY_S
