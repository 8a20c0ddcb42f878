"""``nanogpt eval``: how good a checkpoint is, computed by the runner that would serve it."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from nanogpt.cli._arguments import add_model_arguments, open_model
from nanogpt.errors import InvalidRequest

HELP = "measure a checkpoint: loss on a text, HellaSwag, LAMBADA"
_TASKS = ("loss", "hellaswag", "lambada")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", help="a file or a folder (default: what is served)"
    )
    parser.add_argument(
        "--loss", action="append", metavar="TEXTFILE",
        help="nats a token, bits a byte and perplexity of a text; may be repeated",
    )  # fmt: skip
    parser.add_argument("--hellaswag", metavar="FILE", help="hellaswag_val.jsonl, or llama.cpp's text of it; also .bz2")
    parser.add_argument("--lambada", metavar="FILE", help="lambada_test.jsonl")
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="tokens, items or passages of each task (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.epilog = (
        "The margins are 95 % confidence intervals.\n\n"
        "example, a quantized model against its original:\n"
        "  nanogpt eval log/ --loss val.txt --precision fp32\n  nanogpt eval log/ --loss val.txt --precision int8"
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from nanogpt.eval import tasks

    if args.limit < 0:
        raise InvalidRequest(f"--limit is {args.limit}; it must be 0 (all) or more.", field="limit")
    if not any(getattr(args, name) for name in _TASKS):
        raise InvalidRequest(
            "There is nothing to measure.", remedy="Give --loss, --hellaswag or --lambada with a file."
        )
    progress = _Progress()
    with open_model(args) as llm:
        found: list[dict[str, Any]] = []
        for name in _TASKS:
            given = getattr(args, name)
            for path in [given] if isinstance(given, str) else given or ():
                start = time.monotonic()
                result = getattr(tasks, f"evaluate_{name}")(llm, Path(path), limit=args.limit, progress=progress)
                progress.end()
                found.append({**result, "seconds": round(time.monotonic() - start, 3)})
        card = {key: llm.card[key] for key in ("name", "path", "step", "runner", "precision", "arithmetic", "device")}
    if args.json:
        results = [tasks.without_infinities(result) for result in found]
        print(json.dumps({"model": card, "results": results}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(table(card, found)))
    return 0


def table(card: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """The results as lines of text."""
    lines = [f"{card['name']}, computed by {card['runner']} on {card['device']} in {card['arithmetic']}", ""]
    rows = [("task", "measure", "value", "95 % interval", "of")]
    for r in results:
        if r["task"] == "loss":
            of = f"{r['tokens']:,} tokens of {Path(r['file']).name}"
            rows += [
                ("loss", "nats a token", f"{r['loss']:.4f}", _margin(r["loss_margin"], ".4f"), of),
                ("", "bits a byte", f"{r['bits_per_byte']:.4f}", _margin(r["bits_per_byte_margin"], ".4f"), ""),
                ("", "perplexity", f"{r['perplexity']:.4g}", _interval(r), ""),
            ]
        elif r["task"] == "hellaswag":
            rows += [
                ("hellaswag", "acc_norm", f"{r['accuracy_norm']:.2%}", _margin(r["accuracy_norm_margin"], ".2%"),
                 f"{r['items']:,} items"),
                ("", "acc", f"{r['accuracy']:.2%}", _margin(r["accuracy_margin"], ".2%"), ""),
            ]  # fmt: skip
        else:
            rows += [
                (
                    "lambada",
                    "acc",
                    f"{r['accuracy']:.2%}",
                    _margin(r["accuracy_margin"], ".2%"),
                    f"{r['passages']:,} passages",
                ),
                ("", "perplexity", f"{r['perplexity']:.4g}", _interval(r), ""),
            ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return lines + [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _margin(value: float, form: str) -> str:
    return f"± {value:{form}}" if math.isfinite(value) else "unknown"


def _interval(result: dict[str, Any]) -> str:
    if not math.isfinite(result["perplexity_high"]):
        return "unknown"
    return f"{result['perplexity_low']:.4g} to {result['perplexity_high']:.4g}"


class _Progress:
    """A line on standard error where that is a terminal, at most ten times a second."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._terminal = sys.stderr.isatty()

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._terminal and (now - self._shown > 0.1 or done == total):
            self._shown = now
            print(f"\r\x1b[K{task}: {done:,} of {total:,}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
