"""``nanogpt convert``: a checkpoint as a folder that another project reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.cli._arguments import add_setting
from nanogpt.errors import CheckpointError
from nanogpt.settings import Settings

if TYPE_CHECKING:
    from nanogpt.checkpoint.types import Checkpoint
    from nanogpt.model.config import Activation

HELP = "write a checkpoint as a Hugging Face, nanoGPT or llm.c folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="FILE", help="a checkpoint of any family, or its folder")
    parser.add_argument("folder", metavar="DIR", help="the folder to write; it appears whole or not at all")
    parser.add_argument(
        "--to",
        choices=("huggingface", "nanogpt", "llmc"),
        default="huggingface",
        help="huggingface: config.json, model.safetensors and tokenizer (default); nanogpt: ckpt.pt;"
        " llmc: model.bin, version 3, and its tokenizer file",
    )
    add_setting(parser.add_argument_group("model"), "tokenizer")
    parser.add_argument(
        "--gelu", choices=("erf", "tanh"), help="which GELU the model was trained with (default: detected)"
    )
    parser.add_argument("--force", action="store_true", help="replace what an earlier conversion wrote there")
    parser.add_argument(
        "--change-gelu",
        action="store_true",
        help="write the model although the other project computes the other GELU: its outputs change a little",
    )


def run(args: argparse.Namespace) -> int:
    from nanogpt.checkpoint import load_checkpoint
    from nanogpt.checkpoint.convert import convert

    settings = Settings.load({"tokenizer": args.tokenizer})
    activations: dict[str | None, Activation] = {"erf": "gelu_erf", "tanh": "gelu_tanh"}
    checkpoint = load_checkpoint(args.checkpoint, tokenizer=settings.tokenizer, activation=activations.get(args.gelu))
    folder = Path(args.folder)
    notes = convert(checkpoint, folder, args.to, force=args.force, change_gelu=args.change_gelu)
    notes += _carry_plan(checkpoint, folder)
    print(f"{checkpoint.path} ({checkpoint.family}) → {folder}")
    for file in sorted(folder.iterdir()):
        print(f"  {file.name:<24}{file.stat().st_size:>14,} bytes")
    for note in (*checkpoint.notes, *notes):
        print(f"  {note}")
    return 0


def _carry_plan(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Take an int4 plan along; what a user should know of it."""
    from nanogpt.checkpoint import load_checkpoint
    from nanogpt.runner.int4_plan import carry_plan, plan_path

    if not plan_path(checkpoint).exists():
        return []
    try:
        carried = carry_plan(checkpoint, load_checkpoint(folder))
    except CheckpointError as error:
        return [f"The int4 plan was left behind. {error}"]
    if carried is None:
        return ["The int4 plan was left behind: the weights have another form now. nanogpt quantize makes it again."]
    return [f"The int4 plan goes with it: {carried.name}."]
