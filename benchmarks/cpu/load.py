"""How quiet the machine was while something was measured, and who may measure now.

The kernel's counters tell how long the processors were busy in all; what the measured process used itself is
subtracted, the rest is foreign: other programs, and time that a hypervisor took away.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

DISTURBED = 0.03
"""A sample is marked when foreign load took more than this share of the processors."""

_STAT = Path("/proc/stat")


def busy_s() -> float:
    """Seconds that all processors together were busy or stolen since the machine started."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Foreign load since the watch was made."""

    def __init__(self) -> None:
        self._busy = busy_s()
        self._started = time.perf_counter()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._started

    def foreign(self, own_cpu_s: float) -> float:
        """Share of all processors that others used. Coarse for short times: a tick is 10 ms."""
        wall = self.wall_s
        share = (busy_s() - self._busy - own_cpu_s) / (wall * (os.cpu_count() or 1)) if wall else 0.0
        return round(max(0.0, share), 4)


def wait_until_idle(limit_s: float) -> None:
    """Return when others used under 3 % of the processors for half a second, or when the time is over."""
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        watch = Watch()
        time.sleep(0.5)
        if watch.foreign(0.0) < DISTURBED:
            return


class Turns:
    """An exclusive file lock, so that several people can measure on one machine in turn.

    It is kept from one sample to the next until ``hold_s`` are over, then others get their turn. Without a path it
    does nothing.
    """

    def __init__(self, path: Path | None, hold_s: float = 35.0) -> None:
        self._path = path
        self._hold_s = hold_s
        self._file: IO[str] | None = None
        self._since = 0.0

    def __enter__(self) -> None:
        if self._path and self._file is None:
            self._file = self._path.open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self._file and time.monotonic() - self._since >= self._hold_s:
            self.give_up()

    def give_up(self) -> None:
        """Let the lock go, whatever is left of the turn."""
        if self._file:
            self._file.close()
            self._file = None
