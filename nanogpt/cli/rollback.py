"""``nanogpt rollback``: have a running server return to the model before."""

from __future__ import annotations

import argparse
import json

from nanogpt.cli import _admin
from nanogpt.cli.reload import changed

HELP = "have a running server return to the model before"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _admin.add_server_arguments(parser)
    parser.epilog = (
        "The admin key is taken from ADMIN_KEY. At once where the former model stands by, which is the default.\n"
        "A second rollback returns to where the first one came from."
    )


def run(args: argparse.Namespace) -> int:
    answer = _admin.call(args, "POST", "/admin/rollback", {})
    print(json.dumps(answer, indent=2, ensure_ascii=False) if args.json else changed(answer))
    return 0
