"""``nanogpt train``: a model from prepared text and a configuration file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.errors import MissingDependency

if TYPE_CHECKING:
    from nanogpt.train.trainer import Result

HELP = "train a model from a configuration file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a TOML file such as configs/shakespeare-char.toml")
    add_run_arguments(parser)
    parser.epilog = (
        "out_dir then holds model_%05d.pt, latest_checkpoint.pt, log.txt and metrics.jsonl.\n"
        "Ctrl-C saves a checkpoint and ends; --resume auto goes on from it as if nothing had happened.\n\n"
        "examples:\n  nanogpt train configs/shakespeare-char-cpu.toml --set max_steps=500\n"
        "  torchrun --standalone --nproc-per-node 8 -m nanogpt train configs/gpt2-124m.toml"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What training and fine-tuning share."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key; may be repeated (docs/training.md)",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: go on from the newest checkpoint of out_dir where there is one; never: refuse an occupied folder"
        " (default never)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of the live line")


def run(args: argparse.Namespace) -> int:
    from nanogpt.train.config import load_config

    config = load_config(Path(args.config), args.set, command="train")
    require_torch()
    from nanogpt.train.pretrain import pretrain

    return finish(pretrain(config, resume=args.resume == "auto", json_lines=args.json))


def require_torch() -> None:
    """Raises: MissingDependency."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise MissingDependency(
            "Training needs PyTorch, which is not installed.", remedy="pip install 'nano-gpt-api[train]'"
        ) from None


def finish(result: Result) -> int:
    """The last words of a run, and its exit code."""
    loss = "" if result.val_loss is None else f", validation loss {result.val_loss:.4f}"
    if result.ended_by is not None:
        print(f"Stopped after step {result.step}{loss}; --resume auto goes on.", file=sys.stderr)
        return 128 + result.ended_by
    print(f"Done: {result.step} steps{loss}. {result.path or ''}", file=sys.stderr)
    return 0
