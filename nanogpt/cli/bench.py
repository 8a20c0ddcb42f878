"""``nanogpt bench``: load for a running server, and the speed of a checkpoint by itself."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

from nanogpt.cli._arguments import add_model_arguments
from nanogpt.errors import InvalidRequest

if TYPE_CHECKING:
    from nanogpt.bench.capacity import Search
    from nanogpt.bench.http import Target
    from nanogpt.bench.load import Plan
    from nanogpt.bench.measures import SLO
    from nanogpt.bench.prompts import Workload

HELP = "measure a server under load, or a model by itself"
_SERVE = "load any server with OpenAI's routes, and tell its latencies, rates, goodput and errors"
_MODEL = "prefill and decode speed by batch, memory, and the share of the machine's memory speed"
_SETTINGS = ("tokenizer", "device", "precision", "runner", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="{serve,model}")
    form = argparse.RawDescriptionHelpFormatter
    serve = kinds.add_parser("serve", help=_SERVE, description=_SERVE, formatter_class=form, allow_abbrev=False)
    model = kinds.add_parser("model", help=_MODEL, description=_MODEL, formatter_class=form, allow_abbrev=False)
    _add_serve(serve)
    _add_model(model)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.usage = "nanogpt bench serve [OPTIONS] URL"
    parser.epilog = (
        "The key is taken from API_KEY, or OPENAI_API_KEY. A server of ours that limits clients has to be told to let\n"
        "this one through (RATE_LIMIT=off, or a key with limits of its own). docs/benchmarking.md defines figures.\n\n"
        "examples:\n  nanogpt bench serve http://localhost:5000 --concurrency 8 --duration 30\n"
        "  nanogpt bench serve http://localhost:5000 --rate 4 --slo ttft=200ms,itl=50ms --html load.html\n"
        "  nanogpt bench serve http://localhost:5000 --find-capacity --slo ttft=200ms,itl=50ms"
    )
    parser.add_argument("url", metavar="URL", help="the server, for example http://localhost:5000")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="closed loop: N clients, each sends its next request when its answer has ended (default 8)",
    )
    load.add_argument(
        "--rate",
        type=float,
        metavar="X",
        help="open loop: X requests a second at random moments (Poisson), whatever the server does meanwhile",
    )
    load.add_argument("--duration", type=float, metavar="SECONDS", help="send for so long (default 30)")
    load.add_argument("--requests", type=int, metavar="N", help="send N requests, instead of --duration")
    load.add_argument(
        "--warmup", type=int, default=2, metavar="N", help="requests before, that do not count (default 2)"
    )
    load.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of one request (default 120)")
    load.add_argument(
        "--max-open",
        type=int,
        default=1024,
        metavar="N",
        help="open loop: requests that may be open at"
        " once; further ones are not sent, and counted as errors (default 1024)",
    )
    asked = parser.add_argument_group("requests")
    asked.add_argument(
        "--prompt-tokens", default="64", metavar="N[-M]", help="tokens of a prompt, or a range (default 64)"
    )
    asked.add_argument("--output-tokens", default="64", metavar="N[-M]", help="new tokens, or a range (default 64)")
    asked.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="the first N tokens of prompts are the same (default 0: all random)",
    )
    asked.add_argument(
        "--prefixes", type=int, default=1, metavar="N", help="different beginnings of --shared-prefix (default 1)"
    )
    asked.add_argument(
        "--api", choices=("completions", "chat"), default="completions", help="the route (default completions)"
    )
    asked.add_argument(
        "--prompts",
        choices=("auto", "text"),
        default="auto",
        help="auto: token ids where the server tells its vocabulary, for exact lengths; text: words",
    )
    asked.add_argument("--model", default="", metavar="NAME", help="default: the first that the server lists")
    asked.add_argument("--temperature", type=float, metavar="X", help="default: the server's")
    asked.add_argument(
        "--body", metavar="JSON", help="further fields of each request's body, for example '{\"top_k\": 50}'"
    )
    asked.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="the same seed gives the same prompts, lengths and moments of sending (default 1)",
    )
    goal = parser.add_argument_group("objective")
    goal.add_argument(
        "--slo",
        metavar="LIMITS",
        help="for example ttft=200ms,itl=50ms; also tpot and e2e. Goodput counts requests within all of them",
    )
    goal.add_argument("--find-capacity", action="store_true", help="search the highest rate that meets --slo")
    goal.add_argument(
        "--attainment",
        type=float,
        default=0.99,
        metavar="X",
        help="share of requests that has to meet --slo (default 0.99)",
    )
    goal.add_argument(
        "--trial",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="of sending at each rate, at least 30 requests (default 15)",
    )
    goal.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="X",
        help="end when the rates that are met and not met are this close (default 0.1: 10%%)",
    )
    goal.add_argument("--max-trials", type=int, default=20, metavar="N", help="rates to try at most (default 20)")
    goal.add_argument(
        "--clients",
        type=int,
        default=10,
        metavar="N",
        help="clients that share the capacity, for the recommended RATE_LIMIT (default 10)",
    )
    report = parser.add_argument_group("report")
    report.add_argument("--json", metavar="FILE", help="write figures and each request as JSON; - is standard output")
    report.add_argument("--html", metavar="FILE", help="write one page with plots, which needs nothing else")
    report.add_argument("--quiet", action="store_true", help="no display while it runs")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.usage = "nanogpt bench model [OPTIONS] [CHECKPOINT]"
    parser.epilog = (
        "examples:\n  nanogpt bench model log/model_40000.pt\n"
        "  nanogpt bench model log/model_40000.pt --precision int4 --batches 1,8,32 --json model.json"
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=None,
        metavar="CHECKPOINT",
        help="a file or a folder such as log/ (default: MODEL_CHECKPOINT, else the embedded model)",
    )
    parser.add_argument("--batches", default="1,4,16,32", metavar="N,…", help="sequences at once (default 1,4,16,32)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=0, metavar="N", help="of each prompt (default: an eighth of the context)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, metavar="X", help="of each figure (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - is standard output")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return _run_model(args) if args.what == "model" else _run_serve(args)


# -- serve ------------------------------------------------------------------------------------------------------------


def _run_serve(args: argparse.Namespace) -> int:
    from nanogpt.bench.http import Target
    from nanogpt.bench.measures import SLO

    _check_serve(args)
    slo = SLO.parse(args.slo) if args.slo else None
    target = Target.parse(args.url, os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY") or "")
    report = asyncio.run(_serve(args, target, slo))
    _write(args, report)
    figures = report.get("figures")
    if figures is not None:
        return 0 if figures["completed"] else 1
    return 0 if report["capacity"]["rate"] else 1


async def _serve(args: argparse.Namespace, target: Target, slo: SLO | None) -> dict[str, Any]:
    from nanogpt.bench import report
    from nanogpt.bench.capacity import find_capacity
    from nanogpt.bench.http import Pool
    from nanogpt.bench.live import Live
    from nanogpt.bench.load import run_load
    from nanogpt.bench.prompts import Prompts, discover

    workload = _workload(args)
    pool = Pool(target, args.timeout)
    live = Live(f"nanogpt bench serve {target.url}", quiet=args.quiet)
    try:
        server = await discover(pool, workload)
        if args.find_capacity:
            assert slo is not None
            found = await find_capacity(pool, server, workload, _search(args, slo), say=live.say, show=live)
            return report.as_json(target, server, workload, None, None, slo, found)
        plan = _plan(args)
        done = await run_load(pool, Prompts(workload, server), plan, show=live)
        return report.as_json(target, server, workload, plan, done, slo)
    finally:
        live.close()
        pool.close()


def _check_serve(args: argparse.Namespace) -> None:
    """Raises: InvalidRequest with the flag, its value and what is admitted."""
    between = {
        "concurrency": (1, 10_000),
        "rate": (0.001, 100_000),
        "duration": (0.1, 86_400),
        "requests": (1, 10_000_000),
        "warmup": (0, 10_000),
        "timeout": (0.1, 86_400),
        "max_open": (1, 100_000),
        "shared_prefix": (0, 10_000_000),
        "prefixes": (1, 1_000_000),
        "temperature": (0, 100),
        "attainment": (0.01, 1),
        "trial": (0.1, 3600),
        "tolerance": (0.01, 1),
        "max_trials": (3, 1000),
        "clients": (1, 1_000_000),
    }
    for name, (low, high) in between.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # NaN is not between anything
            flag = "--" + name.replace("_", "-")
            raise InvalidRequest(f"{flag} is {value:g}; it must be from {low:g} to {high:,}.", field=name)
    for one, other in (("rate", "concurrency"), ("duration", "requests")):
        if getattr(args, one) is not None and getattr(args, other) is not None:
            raise InvalidRequest(f"Give --{one} or --{other}, not both.", field=one)
    if args.find_capacity:
        if not args.slo:
            raise InvalidRequest(
                "--find-capacity needs --slo.", remedy="For example --slo ttft=200ms,itl=50ms.", field="slo"
            )
        for name in ("rate", "concurrency", "duration", "requests"):
            if getattr(args, name) is not None:
                raise InvalidRequest(
                    f"--find-capacity chooses the load itself: leave --{name} away.",
                    remedy="--trial says how long each rate is tried.",
                    field=name,
                )


def _plan(args: argparse.Namespace) -> Plan:
    from nanogpt.bench.load import Plan

    return Plan(
        rate=args.rate or 0.0,
        concurrency=0 if args.rate else args.concurrency or 8,
        requests=args.requests or 0,
        duration_s=0.0 if args.requests else args.duration or 30.0,
        warmup=args.warmup,
        max_open=args.max_open,
        seed=args.seed,
    )


def _workload(args: argparse.Namespace) -> Workload:
    from nanogpt.bench.prompts import Lengths, Workload

    try:
        more = json.loads(args.body) if args.body else {}
    except ValueError:
        more = None
    if not isinstance(more, dict):
        raise InvalidRequest("--body is no JSON object.", remedy="For example --body '{\"top_k\": 50}'.", field="body")
    return Workload(
        prompt_tokens=Lengths.parse(args.prompt_tokens, "prompt_tokens"),
        output_tokens=Lengths.parse(args.output_tokens, "output_tokens"),
        shared_prefix=args.shared_prefix,
        prefixes=args.prefixes,
        chat=args.api == "chat",
        text=args.prompts == "text",
        seed=args.seed,
        model=args.model,
        temperature=args.temperature,
        more=more,
    )


def _search(args: argparse.Namespace, slo: SLO) -> Search:
    from nanogpt.bench.capacity import Search

    return Search(
        slo,
        attainment=args.attainment,
        trial_s=args.trial,
        tolerance=args.tolerance,
        max_trials=args.max_trials,
        clients=args.clients,
        seed=args.seed,
    )


def _write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    from nanogpt.bench.page import page
    from nanogpt.bench.report import capacity_table, table, write

    if args.json == "-":
        print(json.dumps(report))
    else:
        print(capacity_table(report) if args.find_capacity else table(report))
        if args.json:
            write(args.json, json.dumps(report, indent=1) + "\n")
    if args.html:
        write(args.html, page(report))


# -- model ------------------------------------------------------------------------------------------------------------


def _run_model(args: argparse.Namespace) -> int:
    from nanogpt.bench.live import Live
    from nanogpt.bench.model import Job, measure, table
    from nanogpt.bench.report import write
    from nanogpt.settings import Settings

    try:
        batches = tuple(int(part) for part in args.batches.split(","))
    except ValueError:
        batches = (0,)
    if not all(1 <= batch <= 4096 for batch in batches):
        raise InvalidRequest(
            f"--batches is {args.batches!r}; it must be numbers from 1 to 4,096 with commas between.", field="batches"
        )
    if args.prompt_tokens < 0:
        raise InvalidRequest(
            f"--prompt-tokens is {args.prompt_tokens}; it must not be negative.", field="prompt_tokens"
        )
    if not 0 < args.seconds <= 3600:
        raise InvalidRequest(f"--seconds is {args.seconds:g}; it must be above 0, up to 3,600.", field="seconds")
    flags = {name: getattr(args, name) for name in _SETTINGS}
    settings = Settings.load({"model_checkpoint": args.checkpoint, **flags})
    live = Live("nanogpt bench model", quiet=args.json == "-")
    try:
        report = measure(settings, Job(batches, args.prompt_tokens, args.seconds), live.say)
    finally:
        live.close()
    if args.json == "-":
        print(json.dumps(report))
    else:
        print(table(report))
        if args.json:
            write(args.json, json.dumps(report, indent=1) + "\n")
    return 0
