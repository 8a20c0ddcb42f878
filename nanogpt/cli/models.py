"""``nanogpt models``: what a running server serves, served before, and refused."""

from __future__ import annotations

import argparse
import json

from nanogpt.cli import _admin

HELP = "list what a running server serves, served, and refused"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _admin.add_server_arguments(parser)
    parser.epilog = "The admin key is taken from ADMIN_KEY. Newest first."


def run(args: argparse.Namespace) -> int:
    models = _admin.call(args, "GET", "/admin/models")["models"]
    if args.json:
        print(json.dumps(models, indent=2, ensure_ascii=False))
        return 0
    rows = [("state", "role", "when", "who", "digest", "model")]
    rows += [
        (
            model["state"],
            model["role"],
            model["at"],
            model["who"],
            str(model["digest"] or "")[:12],
            model["path"] or "(embedded)",
        )
        for model in models
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if i and models[i - 1]["reason"]:
            print(f"    {models[i - 1]['reason']}")
    return 0
