"""``python -m benchmarks.peer_load``: our load generator and guidellm on the same server, turn by turn.

Both send the same number of requests, by as many clients, with prompts and texts of the same lengths. One figure each
for TTFT, TPOT (guidellm's "inter-token latency"), E2E, requests and tokens a second a round; what is compared is the
median over the rounds. docs/benchmarking.md tells how to read it. guidellm is installed apart (``--guidellm``):

    python3 -m venv build/guidellm && build/guidellm/bin/pip install guidellm
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.cpu import machine
from benchmarks.cpu.models import MODELS, make_model
from benchmarks.http import servers
from benchmarks.http.__main__ import PROMPT, prompt_text

_ROOT = Path(__file__).parents[1]
FIGURES = ("ttft_ms", "tpot_ms", "e2e_ms", "requests_per_s", "output_tokens_per_s")
LIMIT_S = 600


def ours(url: str, options: argparse.Namespace, round_: int, folder: Path) -> dict[str, float]:
    out = folder / f"nanogpt-{round_}.json"
    command = [sys.executable, "-m", "nanogpt", "bench", "serve", url, "--quiet", "--json", str(out)]
    command += ["--concurrency", str(options.concurrency), "--requests", str(options.requests), "--warmup", "2"]
    command += [
        "--prompt-tokens",
        str(PROMPT),
        "--output-tokens",
        str(options.output_tokens),
        "--seed",
        str(round_ + 1),
    ]
    cpu_s = run(command, folder / "nanogpt.log")
    report = json.loads(out.read_text())
    figures = report["figures"]
    if figures["completed"] != options.requests:
        raise SystemExit(f"nanogpt bench: {figures['completed']} of {options.requests} requests: {figures['errors']}")
    means = {name: figures[name]["mean"] for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
    rates = {name: figures[name] for name in ("requests_per_s", "output_tokens_per_s")}
    lag = report["client"]["loop_lag_ms"]
    return {**means, **rates, "cpu_s": cpu_s, "lag_ms_p99": lag["p99"] if lag else 0.0}


def guidellm(url: str, options: argparse.Namespace, round_: int, folder: Path) -> dict[str, float]:
    """guidellm 0.8: its rates are over the time from its first request's start to its last one's end, as ours are."""
    data, out = folder / "prompts.jsonl", folder / f"guidellm-{round_}.json"
    rows = [
        {"prompt": prompt_text(1000 * round_ + i), "output_tokens_count": options.output_tokens}
        for i in range(options.requests)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(options.guidellm), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={url},model=default,request_format=/v1/completions"]
    command += ["--profile", f"kind=concurrent,streams={options.concurrency}"]
    command += ["--constraint", f"kind=max_requests,count={options.requests}"]
    command += ["--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={out}"]
    cpu_s = run(command, folder / "guidellm.log")
    requests = json.loads(out.read_text())["benchmarks"][0]["requests"]["successful"]
    if len(requests) < 0.9 * options.requests:  # on a busy machine it gives up some of its last ones
        raise SystemExit(f"guidellm: {len(requests)} of {options.requests} requests completed.")
    seconds = max(r["request_end_time"] for r in requests) - min(r["request_start_time"] for r in requests)
    return {
        "ttft_ms": statistics.mean(r["time_to_first_token_ms"] for r in requests),
        "tpot_ms": statistics.mean(r["inter_token_latency_ms"] for r in requests),
        "e2e_ms": statistics.mean(1000 * r["request_latency"] for r in requests),
        "requests_per_s": len(requests) / seconds,
        "output_tokens_per_s": sum(r["output_tokens"] for r in requests) / seconds,
        "cpu_s": cpu_s,
        "completed": len(requests),
    }


def run(command: list[str], log: Path) -> float:
    """The processor time of the program and its children, its start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=file, stderr=file, timeout=LIMIT_S)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {log.read_text(errors='replace')[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(rounds: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| | nanogpt bench (min–max) | guidellm (min–max) | difference |", "|---|---|---|---|"]
    for name in (*FIGURES, "cpu_s"):
        cells, medians = [], []
        for tool in ("nanogpt", "guidellm"):
            values = [one[name] for one in rounds[tool]]
            medians.append(statistics.median(values))
            cells.append(f"{medians[-1]:,.2f} ({min(values):,.2f}–{max(values):,.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} | {medians[0] / medians[1] - 1:+.1%} |")
    return "\n".join(lines)


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_load", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--url", help="a server that runs (default: ours is started)")
    parser.add_argument("--paced", action="store_true", help="a server that computes nothing and sends each token at"
                        " its time: what is left is the difference between the two tools")  # fmt: skip
    parser.add_argument("--model", choices=list(MODELS), default="gpt2", help="of the server that is started")
    parser.add_argument("--precision", default="int8", choices=("fp32", "int8", "int4"))
    parser.add_argument("--threads", type=int, default=1, help="of its engine: fewer than processors, so that a client"
                        " has one (default 1)")  # fmt: skip
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=40, help="a round (default 40)")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="of each tool (default 5)")
    parser.add_argument("--guidellm", type=Path, default=_ROOT / "build" / "guidellm" / "bin" / "guidellm")
    parser.add_argument("--cache", type=Path, default=_ROOT / "build" / "bench")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/ in the cache)")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = arguments(words)
    if not options.guidellm.exists():
        raise SystemExit(f"{options.guidellm} is not there; --help tells how guidellm is installed.")
    folder = options.cache / "peer-load"
    folder.mkdir(parents=True, exist_ok=True)
    server = None
    if options.paced:
        port = servers.free_port()
        command = [sys.executable, "-m", "benchmarks.paced_server", str(port)]
        server = servers.Server("paced", "", "", command, {}, port)
    elif not options.url:
        model = MODELS[options.model]
        checkpoint = make_model(model, options.cache / "models" / model.name)
        server = servers.ours(checkpoint, options.precision, options.threads, 1)
    url = options.url or f"http://127.0.0.1:{server.port if server else 0}"
    rounds: dict[str, list[dict[str, float]]] = {"nanogpt": [], "guidellm": []}
    started = time.time()
    with servers.running(server, folder / "server.log", 120) if server else nullcontext():
        for number in range(options.rounds):
            order = [("nanogpt", ours), ("guidellm", guidellm)]
            for name, tool in order if number % 2 == 0 else reversed(order):  # neither is always the first
                rounds[name].append(tool(url, options, number, folder))
                shown = {key: round(value, 2) for key, value in rounds[name][-1].items()}
                print(f"# {number + 1} {name}: {shown}", file=sys.stderr, flush=True)
    about: dict[str, Any] = machine.describe(options.threads)
    out = options.out or options.cache / "results" / f"peer-load-{int(started)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: str(value) for key, value in vars(options).items() if key not in ("cache", "out", "guidellm")}
    out.write_text(json.dumps({"format": 1, "machine": about, "options": kept, "rounds": rounds}, indent=1) + "\n")
    print(table(rounds))
    print(f"Written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
