"""What a run shows on a terminal while it goes on: a table by ``rich`` where it is installed, else one line.

The table is drawn by a process of its own (``python -m nanogpt.bench.live``, a JSON line a picture on stdin): drawing
takes milliseconds, and would hold up the loop that stamps arrivals. Where standard error is no terminal, a line now
and then.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from typing import IO, Any

from nanogpt.bench.load import Progress

_EVERY_S = 0.5
_PLAIN_EVERY_S = 10.0


class Live:
    """Call it with the progress as often as you like; ``say`` writes a line that stays. Ends with ``close``."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title, self._quiet = title, quiet
        self._terminal = sys.stderr.isatty()
        self._last = 0.0
        self._seen = (0.0, 0)
        self._process: subprocess.Popen[str] | None = None
        if self._terminal and not quiet and importlib.util.find_spec("rich"):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nanogpt.bench.live"], stdin=subprocess.PIPE, text=True
            )

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._quiet or now - self._last < (_EVERY_S if self._terminal else _PLAIN_EVERY_S):
            return
        self._last = now
        rows = self._rows(progress)
        if self._process is not None:
            self._send({"title": self._title, "rows": rows})
        elif self._terminal:
            print("\r\x1b[K" + _line(rows), end="", file=sys.stderr, flush=True)
        else:
            print(_line(rows), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self._quiet:
            return
        if self._process is not None:
            self._send({"say": text})
        else:
            print(("\r\x1b[K" if self._terminal else "") + text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            try:
                _pipe(process.stdin).close()
                process.wait(5)
            except (OSError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()
        elif self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _send(self, picture: dict[str, Any]) -> None:
        """A display that has ended is no reason to end a measurement."""
        try:
            if self._process is not None:
                stream = _pipe(self._process.stdin)
                stream.write(json.dumps(picture) + "\n")
                stream.flush()
        except OSError:
            pass

    def _rows(self, progress: Progress) -> list[tuple[str, str]]:
        plan, elapsed = progress.plan, max(progress.elapsed_s, 1e-9)
        before, events_before = self._seen if self._seen[0] < elapsed else (0.0, 0)
        self._seen = (elapsed, progress.events)
        # The last hundred tell how it stands now, and cost the same however long the run.
        recent = [outcome for outcome in progress.outcomes[-100:] if not outcome.failure]
        failed = sum(bool(outcome.failure) for outcome in progress.outcomes)
        first = sorted(outcome.ttft_s for outcome in recent if outcome.ttft_s is not None)
        tpot = sorted(outcome.tpot_s for outcome in recent if outcome.tpot_s is not None)
        goal = f" of {plan.requests}" if plan.requests else f" in {plan.duration_s:g} s"
        how = f"{plan.rate:.3g} requests/s" if plan.rate else f"{plan.concurrency} clients"
        return [
            ("load", how),
            ("time", f"{elapsed:.0f} s"),
            ("requests ended", f"{len(progress.outcomes)}{goal if plan.requests else ''}"),
            ("under way", str(len(progress.open))),
            ("errors", str(failed)),
            ("requests/s", f"{len(progress.outcomes) / elapsed:.2f}"),
            ("events/s now", f"{max(0, progress.events - events_before) / (elapsed - before):,.0f}"),
            ("TTFT p50, last 100", f"{first[len(first) // 2] * 1000:.1f} ms" if first else "–"),
            ("TPOT p50, last 100", f"{tpot[len(tpot) // 2] * 1000:.2f} ms" if tpot else "–"),
        ]


def _line(rows: list[tuple[str, str]]) -> str:
    return " | ".join(f"{name} {value}" for name, value in rows)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def draw() -> None:
    """The process that draws: until its standard input ends. Ctrl-C is for the one that measures."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from rich.console import Console
    from rich.live import Live as Picture
    from rich.table import Table

    with Picture(console=Console(stderr=True), refresh_per_second=4, transient=True) as picture:
        for line in sys.stdin:
            said = json.loads(line)
            if "say" in said:
                picture.console.print(said["say"], highlight=False, markup=False)
                continue
            table = Table(title=said["title"], show_header=False)
            for name, value in said["rows"]:
                table.add_row(name, value)
            picture.update(table)


if __name__ == "__main__":
    draw()
