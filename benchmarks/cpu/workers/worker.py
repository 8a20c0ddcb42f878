"""The child's side of a measurement: reads requests on stdin, generates, answers with times. One thread.

Runs inside a peer's virtual environment, so it imports the standard library alone. A request is a line of JSON,
``{"batches": [[prompt, …], …], "new_tokens": n}``; batches run one after the other and the answer tells the wall
time of each, the processor time and the memory. What a peer prints itself goes to stderr, out of the way.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]
"""(prompts, new tokens) → how many new tokens each of them really got."""


def _memory_mb() -> dict[str, float]:
    """VmHWM is the peak of this process alone; the proportional size counts shared pages once."""
    found = {}
    for path, keys in (("/proc/self/status", ("VmHWM:", "VmRSS:")), ("/proc/self/smaps_rollup", ("Pss:",))):
        with open(path) as file:
            for line in file:
                key, _, value = line.partition(":")
                if key + ":" in keys:
                    found[key] = round(int(value.split()[0]) / 1024, 1)
    return {"peak_mb": found["VmHWM"], "rss_mb": found["VmRSS"], "pss_mb": found["Pss"]}


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def serve(load: Callable[[dict[str, Any]], tuple[Generate, dict[str, Any]]]) -> None:
    """``load(options)`` returns the generate function and what to say about the engine (versions, modes)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        started = time.perf_counter()
        generate, about = load(json.loads(sys.argv[1]))
        answer({"about": about, "load_s": round(time.perf_counter() - started, 3), **_memory_mb()})
        for line in sys.stdin:
            request = json.loads(line)
            new_tokens = request["new_tokens"]
            seconds, cpu = [], _cpu_s()
            for batch in request["batches"]:
                before = time.perf_counter()
                counts = generate(batch, new_tokens)
                seconds.append(time.perf_counter() - before)
                if counts != [new_tokens] * len(batch):
                    raise RuntimeError(f"asked for {new_tokens} new tokens for each of {len(batch)}, got {counts}")
            answer({"seconds": seconds, "cpu_s": _cpu_s() - cpu, **_memory_mb()})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"[:500]})
        raise
