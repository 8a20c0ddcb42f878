"""``nanogpt prepare``: texts, instructions or a data set of the Hugging Face hub as token shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanogpt.errors import InvalidRequest

HELP = "tokenize text for training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n  nanogpt prepare text input.txt --tokenizer characters --out data/shakespeare-char\n"
        "  nanogpt prepare jsonl dolly.jsonl --out data/dolly\n"
        "  nanogpt prepare hf HuggingFaceFW/fineweb-edu --name sample-10BT --out data/fineweb-edu"
    )
    parser.add_argument("kind", choices=("text", "jsonl", "hf"), help="text files; instructions, one JSON object a line"
                        " (instruction, context or input, response or output); a data set of the hub, or a local folder"
                        " of parquet or JSON files")  # fmt: skip
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files; for hf the data set's name or folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write, for example data/shakespeare")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="gpt2 (default); characters; bpe, trained on the text (both: text only); or the path of a tokenizer",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="tokens of a bpe that is trained (default 4096)"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=None, metavar="X",
        help="share for validation: the end of each text, every n-th instruction (default 0.1). hf: its first shard"
        " instead",
    )  # fmt: skip
    parser.add_argument(
        "--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens of a shard (default 100,000,000)"
    )
    group = parser.add_argument_group("hf")
    group.add_argument("--name", metavar="NAME", help="the data set's configuration, for example sample-10BT")
    group.add_argument("--split", default="train", metavar="SPLIT", help="its split (default train)")
    group.add_argument("--column", default="text", metavar="NAME", help="its column of text (default text)")
    group.add_argument(
        "--max-tokens", type=int, default=0, metavar="N", help="stop after so many tokens (default: all)"
    )


def run(args: argparse.Namespace) -> int:
    if args.val_fraction is not None and (args.kind == "hf" or not 0 <= args.val_fraction < 1):
        raise InvalidRequest(
            f"--val-fraction is {args.val_fraction:g}; it lies from 0 to less than 1, and hf does not know it.",
            field="val_fraction",
        )
    if not 1024 <= args.shard_tokens <= 2**31:
        raise InvalidRequest(
            f"--shard-tokens is {args.shard_tokens}; it must be between 1,024 and {2**31:,}.", field="shard_tokens"
        )
    try:
        told = _prepare(args)
    except OSError as error:
        raise InvalidRequest(f"Cannot write {args.out}: {error.strerror or error}.", field="out") from None
    tokens = told["tokens"]
    print(
        f"{told['folder']}: {tokens['train']:,} tokens to train on and {tokens['val']:,} for validation;"
        f" tokenizer {told['tokenizer']} of {told['vocabulary']:,} tokens"
    )
    for note in told.get("notes", ()):
        print(f"  {note}")
    return 0


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    folder, sources = Path(args.out), [Path(source) for source in args.sources]
    fraction = 0.1 if args.val_fraction is None else args.val_fraction
    if args.kind == "text":
        from nanogpt.train.prepare import prepare_text

        return prepare_text(
            sources, folder, tokenizer=args.tokenizer, vocab_size=args.vocab_size, val_fraction=fraction,
            shard_tokens=args.shard_tokens,
        )  # fmt: skip
    if args.tokenizer in ("characters", "bpe"):
        raise InvalidRequest(
            f"--tokenizer {args.tokenizer} is made from a text; prepare {args.kind} takes one that exists.",
            remedy="Use gpt2, or the path of a tokenizer.",
            field="tokenizer",
        )
    if args.kind == "jsonl":
        from nanogpt.train.instructions import prepare_instructions

        return prepare_instructions(sources, folder, tokenizer=args.tokenizer, val_fraction=fraction)
    if len(args.sources) != 1:
        raise InvalidRequest(f"prepare hf takes one data set, not {len(args.sources)}.", field="sources")
    from nanogpt.train.prepare_hf import prepare_hf

    return prepare_hf(
        args.sources[0], folder, name=args.name, split=args.split, column=args.column, tokenizer=args.tokenizer,
        shard_tokens=args.shard_tokens, max_tokens=args.max_tokens,
    )  # fmt: skip
