"""The parent's side of a measurement: an engine is started, asked for samples, and ended. One thread.

Two kinds: a worker process that stays for the whole run and answers requests (``workers/``), and llama.cpp's own
benchmark programs, one process a sample.
"""

from __future__ import annotations

import json
import math
import os
import resource
import selectors
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.cpu.load import DISTURBED, Watch
from benchmarks.cpu.models import Model, prompts
from benchmarks.cpu.workloads import Workload, tokens_per_s

WORKERS = Path(__file__).parent / "workers"
END_S = 5.0
"""How long a worker that was told to end may take."""


class EngineFailed(Exception):
    """The engine cannot be measured; the message becomes its row in the table."""


@dataclass(frozen=True)
class Sample:
    """``foreign``: the share of all processors that others used meanwhile."""

    tokens_per_s: float
    wall_s: float
    foreign: float
    peak_mb: float

    @property
    def disturbed(self) -> bool:
        return self.foreign > DISTURBED


class Engine(Protocol):
    about: dict[str, Any]

    def start(self) -> None: ...

    def sample(self, workload: Workload, seed: int) -> Sample: ...

    def close(self) -> None: ...


class Worker:
    """An engine in a worker process. ``limit_s`` bounds each answer; ``log`` gets what the engine says."""

    def __init__(
        self,
        model: Model,
        python: Path,
        script: str,
        options: dict[str, Any],
        *,
        log: Path,
        sample_s: float,
        limit_s: float,
    ) -> None:
        self.about: dict[str, Any] = {}
        self._model = model
        self._log = log
        self._sample_s = sample_s
        self._limit_s = limit_s
        self._runs: dict[tuple[str, int], int] = {}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), str(WORKERS / script), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )

    def start(self) -> None:
        ready = self._answer()
        self.about = {**ready["about"], "load_s": ready["load_s"], "loaded_mb": ready["rss_mb"]}

    def sample(self, workload: Workload, seed: int) -> Sample:
        """The first sample of a workload warms it up and finds how many runs make it long enough to be timed."""
        if (workload.name, workload.new) not in self._runs:
            for new in {1, workload.new} if workload.name == "W1" else {workload.new}:
                self._ask(workload, new, 1, seed)
                once = self._ask(workload, new, 1, seed + 1)["seconds"][0]
                self._runs[workload.name, new] = min(32, max(1, math.ceil(self._sample_s / once)))
        watch = Watch()
        cpu_s, first = 0.0, []
        if workload.name == "W1":
            answer = self._ask(workload, 1, self._runs[workload.name, 1], seed + 2)
            first = answer["seconds"]
            cpu_s += answer["cpu_s"]
        answer = self._ask(workload, workload.new, self._runs[workload.name, workload.new], seed + 3)
        cpu_s += answer["cpu_s"]
        value = tokens_per_s(workload, self._model, answer["seconds"], first)
        return Sample(value, watch.wall_s, watch.foreign(cpu_s), answer["peak_mb"])

    def close(self) -> None:
        _end(self._process)

    def _ask(self, workload: Workload, new: int, runs: int, seed: int) -> dict[str, Any]:
        batches = [
            prompts(self._model.vocab_size, workload.batch, workload.prompt_of(self._model), seed * 64 + run)
            for run in range(runs)
        ]
        request = json.dumps({"batches": batches, "new_tokens": new}).encode() + b"\n"
        try:
            _pipe(self._process.stdin).write(request)
            _pipe(self._process.stdin).flush()
        except BrokenPipeError:
            raise EngineFailed(self._why()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        answers = _pipe(self._process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(answers, selectors.EVENT_READ)
            if not selector.select(self._limit_s):
                raise EngineFailed(f"no answer within {self._limit_s:.0f} s")
        line = answers.readline()
        if not line:
            raise EngineFailed(self._why())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer

    def _why(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"ended with exit code {code}: {lines[-1] if lines else 'it said nothing'}"


class LlamaCpp:
    """llama-bench for W1 and W3, llama-batched-bench for W2. It feeds random tokens and does not sample any."""

    def __init__(self, model: Model, bin: Path, gguf: Path, threads: int, *, sample_s: float, limit_s: float) -> None:
        self.about: dict[str, Any] = {}
        self._model = model
        self._bin = bin
        self._common = ["-m", str(gguf), "-t", str(threads), "-ngl", "0"]
        self._threads = threads
        self._sample_s = sample_s
        self._limit_s = limit_s
        self._runs: dict[str, int] = {}

    def start(self) -> None:
        rows, _, _ = self._run("llama-bench", ["-p", "0", "-n", "1", "-r", "1", "-o", "jsonl"])
        self.about = {"build": rows[0]["build_commit"], "model": rows[0]["model_type"]}

    def sample(self, workload: Workload, seed: int) -> Sample:
        if workload.name not in self._runs:
            once = self._seconds(workload, 1)[0][0]
            self._runs[workload.name] = min(32, max(1, math.ceil(self._sample_s / once)))
        watch = Watch()
        seconds, cpu_s, peak_mb = self._seconds(workload, self._runs[workload.name])
        foreign, wall = watch.foreign(cpu_s), watch.wall_s
        tokens = workload.prompt_of(self._model) if workload.name == "W3" else workload.batch * workload.new
        return Sample(tokens * len(seconds) / sum(seconds), wall, foreign, peak_mb)

    def close(self) -> None:
        """Nothing stays running between samples."""

    def _seconds(self, workload: Workload, runs: int) -> tuple[list[float], float, float]:
        """Wall time of each run, processor time, peak memory. The programs warm up themselves."""
        if workload.name == "W1":
            shape = ["-p", "0", "-n", str(workload.new), "-d", str(workload.prompt)]
        elif workload.name == "W3":
            shape = ["-p", str(self._model.prefill), "-n", "0", "-b", "1024", "-ub", "1024"]
        else:
            shape = ["-npp", str(workload.prompt), "-ntg", str(workload.new)]
            shape += ["-npl", ",".join([str(workload.batch)] * runs)]
            shape += ["-c", str(workload.batch * (workload.prompt + workload.new)), "-b", "2048", "-ub", "1024"]
            rows, cpu_s, peak_mb = self._run(
                "llama-batched-bench", [*shape, "-tb", str(self._threads), "--output-format", "jsonl"]
            )
            return [row["t"] for row in rows], cpu_s, peak_mb
        rows, cpu_s, peak_mb = self._run("llama-bench", [*shape, "-fa", "on", "-r", str(runs), "-o", "jsonl"])
        return [ns / 1e9 for ns in rows[0]["samples_ns"]], cpu_s, peak_mb

    def _run(self, program: str, arguments: list[str]) -> tuple[list[dict[str, Any]], float, float]:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [self._bin / program, *self._common, *arguments], stdout=out, stderr=errors, start_new_session=True
            )
            usage = _wait(process, self._limit_s)
            out.seek(0)
            rows = [json.loads(line) for line in out.read().decode().splitlines() if line.startswith("{")]
            if process.returncode or not rows:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                last = lines[-1] if lines else "it said nothing"
                raise EngineFailed(f"{program} ended with exit code {process.returncode}: {last}")
        return rows, usage.ru_utime + usage.ru_stime, round(usage.ru_maxrss / 1024, 1)


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> resource.struct_rusage:
    """Reap the process ourselves: only wait4 tells the times and the peak memory of this child alone."""
    end = time.monotonic() + limit_s
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            _, status, _ = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            raise EngineFailed(f"not done within {limit_s:.0f} s")
        time.sleep(0.005)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    """Popen types its pipes as optional; a worker's are always there."""
    if pipe is None:
        raise TypeError("the process was started without a pipe")
    return pipe


def _end(process: subprocess.Popen[bytes]) -> None:
    """A worker ends when its stdin closes; one that does not is killed with its children."""
    for pipe in (process.stdin, process.stdout):
        if pipe:
            try:
                pipe.close()
            except BrokenPipeError:
                pass
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
