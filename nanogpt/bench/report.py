"""A run's figures as tables for people. The JSON that they are taken from is made here too."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

from nanogpt._version import __version__
from nanogpt.bench.capacity import Capacity
from nanogpt.bench.http import Target
from nanogpt.bench.load import Plan, Run
from nanogpt.bench.measures import SLO, per_second, summary
from nanogpt.bench.prompts import Server, Workload
from nanogpt.errors import InvalidRequest

FORMAT = 1
TIMES = {"ttft_ms": "TTFT, ms", "itl_ms": "ITL, ms", "tpot_ms": "TPOT, ms", "e2e_ms": "E2E, ms"}
_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def as_json(
    target: Target, server: Server, workload: Workload, plan: Plan | None, run: Run | None, slo: SLO | None,
    capacity: Capacity | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that a report shows, and each request, so that other figures can be made of it. No key, no prompt."""
    report: dict[str, Any] = {
        "format": FORMAT,
        "tool": f"nanogpt bench serve {__version__}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client_machine": f"{platform.machine()}, Python {platform.python_version()}",
        "url": target.url,
        "model": server.model,
        "workload": {
            "api": "chat" if workload.chat else "completions",
            "prompt_tokens": str(workload.prompt_tokens),
            "output_tokens": str(workload.output_tokens),
            "shared_prefix": workload.shared_prefix,
            "prefixes": workload.prefixes if workload.shared_prefix else 0,
            "prompts": "token ids" if server.vocabulary and not workload.chat and not workload.text else "text",
            "lengths_forced": server.ignores_eos,
            "temperature": workload.temperature,
            "seed": workload.seed,
        },
    }
    if capacity is not None:
        report["capacity"] = capacity.as_json()
    if run is not None and plan is not None:
        report["plan"] = {
            "rate": plan.rate or None, "concurrency": plan.concurrency or None, "requests": plan.requests or None,
            "duration_s": plan.duration_s or None, "warmup": plan.warmup,
        }  # fmt: skip
        report["figures"] = summary(run.outcomes, slo)
        report["client"] = run.client
        report["per_second"] = [{name: round(value, 2) for name, value in row.items()} for row in
                                per_second(run.outcomes)]  # fmt: skip
        report["each_request"] = [
            {
                "sent_s": round(outcome.sent_s, 5),
                "ttft_ms": _ms(outcome.ttft_s),
                "tpot_ms": _ms(outcome.tpot_s),
                "e2e_ms": _ms(outcome.e2e_s),
                "prompt_tokens": outcome.prompt_tokens,
                "output_tokens": outcome.output_tokens,
                "error": outcome.failure or None,
            }
            for outcome in sorted(run.outcomes, key=lambda outcome: outcome.sent_s)
        ]
    return report


def write(path: str, text: str) -> None:
    """Raises: InvalidRequest."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"Cannot write {path}: {error.strerror or error}.") from None


def table(report: dict[str, Any]) -> str:
    """The figures of a run, for a terminal."""
    figures, client = report["figures"], report["client"]
    lines = [
        f"{report['model']} at {report['url']}: {how_loaded(report)}",
        "",
        f"{'requests':<24}{figures['completed']} of {figures['requests']} completed in {figures['duration_s']:.1f} s",
        f"{'requests a second':<24}{figures['requests_per_s']:,.2f}",
        f"{'output tokens a second':<24}{figures['output_tokens_per_s']:,.1f}",
        f"{'all tokens a second':<24}{figures['total_tokens_per_s']:,.1f}",
        f"{'under way at once':<24}{figures['mean_concurrency']:.1f} on average, {figures['peak_concurrency']} at most",
    ]
    if goodput := figures.get("goodput"):
        limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in goodput["slo_ms"].items())
        lines.append(
            f"{'goodput':<24}{goodput['requests_per_s']:,.2f} requests a second within {limits}"
            f" ({goodput['attainment']:.1%})"
        )
    lines += ["", f"{'':<16}" + "".join(f"{name:>11}" for name in _COLUMNS)]
    names = {**TIMES, "prompt_tokens": "prompt tokens", "output_tokens": "output tokens"}
    for name, label in names.items():
        if values := figures[name]:
            lines.append(f"{label:<16}" + "".join(f"{values[column]:>11,.2f}" for column in _COLUMNS))
    if figures["errors"]:
        lines += ["", "errors"]
        lines += [f"  {count:>7,}  {kind}" for kind, count in figures["errors"].items()]
    if any(kind.startswith("429") for kind in figures["errors"]):
        lines.append("  429: the server's limit for one client. RATE_LIMIT=off there, or a key with limits of its own.")
    cost = f"{client['cpu_us_per_token']:g} µs a token" if client["cpu_us_per_token"] else "no tokens"
    lag = client["loop_lag_ms"]
    lines += [
        "",
        f"client: {client['cpu_share']:.0%} of a processor ({cost})"
        + (f", event loop late by {lag['p50']:.1f} ms at p50, {lag['p99']:.1f} ms at p99" if lag else ""),
    ]
    if client["warning"]:
        lines.append(f"WARNING: {client['warning']}")
    if not report["workload"]["lengths_forced"]:
        lines.append("The server does not take ignore_eos: texts may be shorter than --output-tokens.")
    return "\n".join(lines)


def capacity_table(report: dict[str, Any]) -> str:
    """The search, its verdict and the settings that follow."""
    found = report["capacity"]
    limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in found["slo_ms"].items())
    lines = [
        f"{report['model']} at {report['url']}: {what_asked(report)}",
        f"objective: {limits}, for at least {found['attainment']:.1%} of all requests",
        "",
        f"{'':<10}{'requests/s':>11}{'verdict':>11}{'within':>9}{'TTFT p99':>12}{'ITL mean':>11}{'tokens/s':>10}",
    ]
    for trial in found["trials"]:
        figures = trial["figures"]
        ttft, itl = figures["ttft_ms"], figures["itl_ms"]
        lines.append(
            f"{trial['purpose']:<10}{trial['rate']:>11.3f}{'met' if trial['met'] else 'not met':>11}"
            f"{'early end' if trial['cut_short'] else format(trial['attainment'], '.1%'):>9}"
            f"{_shown(ttft, 'p99'):>12}{_shown(itl, 'mean'):>11}"
            f"{figures['output_tokens_per_s']:>10,.0f}"
        )
    lines.append("")
    if found["rate"]:
        sure = "confirmed by a second run" if found["confirmed"] else "NOT confirmed"
        lines.append(f"capacity: {found['rate']:.3f} requests a second, {sure}. {found['why']}")
    else:
        lines.append(f"capacity: none. {found['why']}")
    warned = [trial["client"]["warning"] for trial in found["trials"] if trial["client"]["warning"]]
    if warned:
        lines.append(f"WARNING, in {len(warned)} of {len(found['trials'])} trials: {warned[-1]}")
    if found["recommended"]:
        lines += ["", "settings to begin with (try them, and search again):"]
        lines += [
            f"  {name}={value['value']}  # {value['why']}" if " " not in str(value["value"]) else
            f"  {name}='{value['value']}'  # {value['why']}"
            for name, value in found["recommended"].items()
        ]  # fmt: skip
    return "\n".join(lines)


def how_loaded(report: dict[str, Any]) -> str:
    plan = report["plan"]
    load = (
        f"open loop, {plan['rate']:g} requests a second (Poisson)" if plan["rate"]
        else f"closed loop, {plan['concurrency']} clients"
    )  # fmt: skip
    return f"{load}; {what_asked(report)}"


def what_asked(report: dict[str, Any]) -> str:
    workload = report["workload"]
    shared = f" ({workload['shared_prefix']} of them shared)" if workload["shared_prefix"] else ""
    prompt = f"{workload['prompt_tokens']} prompt tokens{shared}"
    return f"{workload['api']}, {prompt}, {workload['output_tokens']} output tokens"


def _shown(values: dict[str, float] | None, column: str) -> str:
    return f"{values[column]:.2f} ms" if values else "–"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)
