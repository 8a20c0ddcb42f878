"""Measure streams over HTTP against the engine alone, and llama-server beside it. See README.md."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cpu import machine
from benchmarks.cpu.engines import EngineFailed
from benchmarks.cpu.install import Installer
from benchmarks.cpu.load import Turns, wait_until_idle
from benchmarks.cpu.models import MODELS, make_model
from benchmarks.cpu.peers import ROWS, Context, start
from benchmarks.cpu.workloads import Workload
from benchmarks.http import servers

_ROOT = Path(__file__).parents[2]
PROMPT, NEW = 64, 128


def prompt_text(seed: int) -> str:
    """64 tokens of the benchmark's tokenizers: 32 times a space and a letter, which no merge joins."""
    draw = random.Random(seed)
    return "".join(" " + draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(PROMPT // 2))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -(-int(len(ordered) * share * 1000) // 1000) - 1))]


def load(server: servers.Server, streams: int, waves: int, seed: int, limit_s: float) -> dict[str, Any]:
    """The client's result for that many waves. Raises: EngineFailed."""
    numbers = iter(range(seed, seed + waves * streams))
    bodies = [[server.body(prompt_text(next(numbers)), NEW) for _ in range(streams)] for _ in range(waves)]
    job = {"port": server.port, "path": server.path, "waves": bodies, "limit_s": limit_s}
    command = [sys.executable, "-m", "benchmarks.http.client"]
    done = subprocess.run(
        command, cwd=_ROOT, input=json.dumps(job), capture_output=True, text=True, timeout=limit_s * (waves + 1)
    )
    result: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}
    if "error" in result:
        raise EngineFailed(str(result["error"]))
    return result


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds for times. ``itl_p99_over_median`` is the evenness of the streams."""
    rates = [rate for result in results for rate in result["tokens_per_s"]]
    first = [value * 1000 for result in results for value in result["ttft_s"]]
    gaps = [value * 1000 for result in results for value in result["gaps_s"]]
    median_gap = statistics.median(gaps)
    return {
        "tokens_per_s": {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "waves": len(rates)},
        "ttft_ms": {name: round(percentile(first, share), 2) for name, share in (("p50", 0.5), ("p99", 0.99))},
        "itl_ms": {
            name: round(percentile(gaps, share), 3)
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
        },
        "itl_p99_over_median": round(percentile(gaps, 0.99) / median_gap, 2) if median_gap else None,
        "events_per_stream": round(len(gaps) / len(first) + 1, 1),
        "tokens_per_stream": statistics.mean(n for result in results for n in result["tokens"]),
        "client_cpu_share": max(result["client_cpu_share"] for result in results),
    }


def engine_figure(row_name: str, context: Context, streams: int, seed: int, repeats: int) -> dict[str, Any]:
    """The engine alone at the same batch: what the HTTP figure is a share of. Raises: EngineFailed."""
    engine = start(next(row for row in ROWS if row.name == row_name), context)
    if isinstance(engine, str):
        raise EngineFailed(engine)
    workload = Workload(f"W2-{streams}", "the same without HTTP", streams, PROMPT, NEW)
    try:
        samples = [engine.sample(workload, seed + 10 * number) for number in range(repeats)]
    finally:
        engine.close()
    rates = [sample.tokens_per_s for sample in samples]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http", description=__doc__)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32], help="streams at once (default 1 8 32)")
    parser.add_argument("--precision", default="int8", choices=("int8", "int4"), help="of this product's server")
    parser.add_argument("--waves", type=int, default=5, help="waves of streams that a figure rests on")
    parser.add_argument("--workers", type=int, default=2, help="gunicorn workers of this product's server")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine")
    parser.add_argument("--only-ours", action="store_true", help="leave llama-server out")
    parser.add_argument("--limit", type=float, default=120, help="seconds that one wave may take")
    parser.add_argument("--wait-idle", type=float, default=5, help="seconds to wait for a quiet machine before a wave")
    parser.add_argument("--lock", type=Path, help="file to lock while measuring, to take turns with other programs")
    parser.add_argument("--cache", type=Path, default=_ROOT / "build" / "bench")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/ in the cache)")
    return parser.parse_args(words)


def measure(server: servers.Server, context: Context, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of streams. The server stays up; the engine alone runs beside it, while it is idle."""
    rows: list[dict[str, Any]] = []
    log = options.cache / "logs" / f"http-{server.name.split()[0]}.log"
    with servers.running(server, log, 60):
        load(server, 2, 1, 1, options.limit)
        for streams in options.streams:
            row: dict[str, Any] = {"model": context.model.name, "server": server.name, "streams": streams}
            rows.append(row)
            results = []
            for number in range(options.waves + 1):
                with Turns(options.lock, hold_s=0):
                    wait_until_idle(options.wait_idle)
                    results.append(load(server, streams, 1, 1000 * (number + 1), options.limit))
            row.update(summary(results[1:]))
            with Turns(options.lock, hold_s=0):
                wait_until_idle(options.wait_idle)
                row["engine_alone"] = engine_figure(server.row, context, streams, 7, options.waves)
            row["share_of_engine"] = round(row["tokens_per_s"]["median"] / row["engine_alone"]["median"], 3)
            _say(f"{row['model']} {server.name} {streams}: {row['tokens_per_s']['median']:,.0f} tokens/s")
    return rows


def measured_or_why(
    model: str, name: str, make: Callable[[], servers.Server], context: Context, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The server's rows, or one that says why there are none."""
    try:
        return measure(make(), context, options)
    except EngineFailed as failure:
        _say(f"{model} {name}: {failure}")
        return [{"model": model, "server": name, "error": str(failure)}]


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("", "streams", "tokens/s (min–max)", "share of the engine's own", "TTFT p50 / p99, ms")
    lines = ["| " + " | ".join((*heads, "ITL p50 / p99, ms", "p99 / p50")) + " |", "|---" * 7 + "|"]
    for row in rows:
        name = f"{row['model']} {row['server']}"
        if "error" in row:
            lines.append(f"| {name} | – | {row['error']} | | | | |")
            continue
        rate, ttft, itl = row["tokens_per_s"], row["ttft_ms"], row["itl_ms"]
        lines.append(
            f"| {name} | {row['streams']} | {rate['median']:,.0f} ({rate['min']:,.0f}–{rate['max']:,.0f}) "
            f"| {row['share_of_engine']:.0%} | {ttft['p50']:.1f} / {ttft['p99']:.1f} "
            f"| {itl['p50']:.2f} / {itl['p99']:.2f} | {row['itl_p99_over_median']} |"
        )
    return "\n".join(lines)


def main(words: list[str]) -> int:
    options = arguments(words)
    installer = Installer(options.cache, limit_s=3600)
    about = machine.describe(options.threads)
    about["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows: list[dict[str, Any]] = []
    for name in options.models:
        model = MODELS[name]
        folder = make_model(model, options.cache / "models" / name)
        context = Context(installer, model, folder, options.threads, 0.7, options.limit)
        own = partial(servers.ours, folder, options.precision, options.threads, options.workers)
        peer = partial(servers.llama_server, installer, folder, options.threads, max(options.streams), PROMPT + NEW)
        makers = {"nano-gpt-api": own} if options.only_ours else {"nano-gpt-api": own, "llama-server": peer}
        for server_name, make in makers.items():
            rows += measured_or_why(name, server_name, make, context, options)
    out = options.out or options.cache / "results" / f"http-{about['time'].replace(':', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in vars(options).items() if key not in ("cache", "out", "lock")}
    out.write_text(json.dumps({"format": 1, "machine": about, "options": kept, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"Written: {out}")
    return 0 if any("error" not in row for row in rows) else 1


def _say(message: str) -> None:
    print(f"# {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
