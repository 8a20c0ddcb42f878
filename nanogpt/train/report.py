"""What a run says: ``log.txt`` in build-nanogpt's form, ``metrics.jsonl`` for machines, and the terminal.

On a terminal there is one live line (by ``rich`` where it is installed); elsewhere a line every ``log_interval``
steps, or with ``json_lines`` one JSON object each. Owned by the run's first process.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from nanogpt.errors import MissingDependency

LOG: Final = "log.txt"
METRICS: Final = "metrics.jsonl"


class Report:
    """One line of output for each event. ``step`` counts steps that are done."""

    def __init__(self, folder: Path, *, max_steps: int, start: int, json_lines: bool, tensorboard: bool) -> None:
        self._max_steps, self._json = max_steps, json_lines
        _forget_after(folder / LOG, start, lambda line: int(line.split(" ", 1)[0]))
        _forget_after(folder / METRICS, start, lambda line: int(json.loads(line)["step"]))
        self._log = (folder / LOG).open("a", encoding="utf-8")
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        self._events = _summary_writer(folder) if tensorboard else None
        self._live = None if json_lines or not sys.stderr.isatty() else _live_line(max_steps)

    def train(self, step: int, losses: list[tuple[int, float]], **values: float) -> None:
        """The steps since the last call, and what is known of the last one."""
        for number, loss in losses:
            self._log.write(f"{number} train {loss:.6f}\n")
        self._log.flush()
        loss = losses[-1][1]
        self._event({"event": "train", "step": step, "loss": loss, **values})
        left = clock(values["seconds_left"])
        parts = [f"loss {loss:.4f}", f"lr {values['learning_rate']:.2e}", f"norm {values['grad_norm']:.2f}",
                 f"{values['tokens_per_second']:,.0f} tok/s"]  # fmt: skip
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        if self._live is not None:
            self._live.update(step, " | ".join(parts), left)
        elif not self._json:
            print(" | ".join([f"step {step:>6}/{self._max_steps}", *parts, f"{left} left"]), flush=True)

    def validation(self, step: int, loss: float, seconds: float) -> None:
        self._log.write(f"{step} val {loss:.4f}\n")
        self._log.flush()
        self._event({"event": "validation", "step": step, "loss": loss, "seconds": seconds})
        self.say(f"step {step:>6} | validation loss {loss:.4f}")

    def saved(self, step: int, path: Path) -> None:
        self._event({"event": "checkpoint", "step": step, "path": str(path)})
        self.say(f"step {step:>6} | saved {path}")

    def say(self, text: str) -> None:
        """A line for people."""
        if self._live is not None:
            self._live.print(text)
        elif not self._json:
            print(text, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.close()
        if self._events is not None:
            self._events.close()
        self._log.close()
        self._metrics.close()

    def _event(self, value: dict[str, Any]) -> None:
        line = json.dumps({**value, "time": round(time.time(), 3)})
        self._metrics.write(line + "\n")
        self._metrics.flush()
        if self._json:
            print(line, flush=True)
        if self._events is not None and "loss" in value:
            self._events.add_scalar(f"loss/{value['event']}", value["loss"], value["step"])


def clock(seconds: float) -> str:
    """3:07, or 1:02:33."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _PlainLive:
    """The live line without ``rich``: written over itself."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps

    def update(self, step: int, text: str, left: str) -> None:
        print(f"\r\x1b[K{step}/{self._max_steps} | {text} | {left} left", end="", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        print(f"\r\x1b[K{text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        print(file=sys.stderr, flush=True)


class _RichLive:
    def __init__(self, max_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("{task.fields[left]} left"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=max_steps, text="", left="?")
        self._progress.start()

    def update(self, step: int, text: str, left: str) -> None:
        self._progress.update(self._task, completed=step, text=text, left=left)

    def print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


def _live_line(max_steps: int) -> _PlainLive | _RichLive:
    try:
        return _RichLive(max_steps)
    except ImportError:
        return _PlainLive(max_steps)


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency(
            "tensorboard is true, but TensorBoard is not installed.", remedy="pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder))


def _forget_after(path: Path, start: int, step_of: Any) -> None:
    """Drops the lines of steps that will be done again: the run died behind its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        with suppress(ValueError, KeyError, TypeError):  # the line in which the run died
            if line.endswith("\n") and step_of(line) <= start:
                kept.append(line)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text("".join(kept), "utf-8")
    scratch.replace(path)
