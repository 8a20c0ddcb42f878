"""``nanogpt reload``: have a running server serve another checkpoint, without a lost request."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nanogpt.cli import _admin
from nanogpt.errors import InvalidRequest

HELP = "have a running server serve another checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, or a folder such as log/, on the server")
    parser.add_argument("--loss-gate", metavar="TEXT", help="serve it only if its loss on this text file is low enough")
    parser.add_argument("--max-loss", type=float, metavar="X", help="the highest loss, in nats a token")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="change the second model, of a server with COMPARE_CHECKPOINT; what everybody gets stays",
    )
    _admin.add_server_arguments(parser)
    parser.epilog = (
        "The admin key is taken from ADMIN_KEY. The new model is loaded and tested beside the old one, which serves\n"
        "on if anything fails. Exit code 0: the new one serves; 1: the old one does; 2: the request was wrong.\n\n"
        "examples:\n  nanogpt reload log/model_40000.pt\n  nanogpt reload log/model_40000.pt --compare\n"
        "  nanogpt reload log/ --loss-gate val.txt --max-loss 1.6 --url http://localhost:8080"
    )


def run(args: argparse.Namespace) -> int:
    if (args.loss_gate is None) != (args.max_loss is None):
        raise InvalidRequest("--loss-gate and --max-loss are one gate: give both, or neither.", field="loss_gate")
    body: dict[str, Any] = {"checkpoint": _admin.server_path(args.checkpoint, args.url)}
    if args.loss_gate is not None:
        body["loss_gate"] = {"text": _admin.server_path(args.loss_gate, args.url), "max_loss": args.max_loss}
    if args.compare:
        body["compare"] = True
    answer = _admin.call(args, "POST", "/admin/reload", body)
    if args.json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    elif args.compare:
        what = f"{_admin.describe(answer['model'])} from {answer['model']['path']}"
        print(f'To compare with, for requests with "model": "compare": {what}.')
    else:
        print(changed(answer))
    return 0


def changed(answer: dict[str, Any]) -> str:
    """What serves now, and what was before."""
    line = f"Serving {_admin.describe(answer['model'])} from {answer['model']['path']}."
    previous = answer["previous"]
    if previous:
        line += f"\nBefore: {_admin.describe(previous)}; nanogpt rollback returns to it."
    return line
