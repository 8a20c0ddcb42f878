"""``nanogpt finetune``: teach a checkpoint to answer instructions."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanogpt.cli.train import add_run_arguments, finish, require_torch

HELP = "fine-tune a checkpoint on instructions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of any family, or its folder")
    parser.add_argument(
        "data", metavar="DATA", help="a JSONL file of instruction, context and response; or a prepared folder"
    )
    parser.add_argument("--config", metavar="TOML", help="keys as for nanogpt train, but those of the model")
    parser.add_argument("--tokenizer", default="", metavar="NAME", help="where it cannot be detected: gpt2 or a path")
    add_run_arguments(parser)
    parser.epilog = (
        "Only the answers count in the loss. The template is kept with the checkpoint, and nanogpt chat uses it.\n\n"
        "example:\n  nanogpt finetune log/ dolly.jsonl --set max_steps=500\n  nanogpt chat logs_finetune/"
    )


def run(args: argparse.Namespace) -> int:
    from nanogpt.train.config import load_config

    require_torch()
    from nanogpt.train.finetune import DEFAULTS, finetune

    config = load_config(Path(args.config) if args.config else None, args.set, command="finetune", **DEFAULTS)
    return finish(
        finetune(
            args.checkpoint,
            Path(args.data),
            config,
            tokenizer=args.tokenizer,
            resume=args.resume == "auto",
            json_lines=args.json,
        )
    )
