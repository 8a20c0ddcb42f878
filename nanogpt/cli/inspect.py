"""``nanogpt inspect``: what a checkpoint is, and on request the proof that it is computed as it was trained."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.cli._arguments import add_model_arguments, open_model
from nanogpt.errors import InvalidRequest
from nanogpt.settings import Settings

if TYPE_CHECKING:
    from nanogpt.llm import LLM

HELP = "print what a checkpoint is; prove it by its loss on a text"
_MIN_PREDICTIONS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="FILE",
        nargs="?",
        help="a checkpoint of any family, or its folder (default: what is served)",
    )
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    parser.add_argument("--no-hash", action="store_true", help="do not compute the weights' SHA-256")
    parser.add_argument(
        "--proof", metavar="TEXTFILE", help="compute the loss on a text that the model was not trained on"
    )
    parser.add_argument(
        "--proof-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="predictions of the proof, from the text's beginning (default 4096)",
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from nanogpt.checkpoint import card, load_checkpoint, weights_sha256

    settings = Settings.load({"model_checkpoint": args.checkpoint, "tokenizer": args.tokenizer})
    checkpoint = load_checkpoint(settings.model_checkpoint, tokenizer=settings.tokenizer)
    described = card(checkpoint)
    if not args.no_hash:
        described["weights_sha256"] = weights_sha256(checkpoint)
    if args.proof is not None:
        described["proof"] = _proof(args)
    if args.json:
        print(json.dumps(described, indent=2, ensure_ascii=False))
    else:
        print("\n".join(render(described)))
    return 0


def render(card: dict[str, Any]) -> list[str]:
    """The card as lines of text: a name, and what is known under it."""
    loss = card["recorded_loss"]
    vocabulary = f"{card['num_tokens']:,} tokens"
    if card["num_tokens"] < card["vocab_size"]:
        vocabulary += f", padded to {card['vocab_size']:,} rows"
    gelu = {"gelu_erf": "erf (exact)", "gelu_tanh": "tanh (approximation)"}[card["activation"]]
    rows = [
        ("model", card["name"]),
        ("file", f"{card['path']} ({_bytes(card['file_bytes'])})"),
        ("family", card["family"]),
        ("step", "not recorded" if card["step"] is None else f"{card['step']:,}"),
        ("loss", "not recorded" if loss is None else f"{loss:.4f} (recorded in the file)"),
        ("parameters", f"{card['parameters']:,} in {card['dtype']}, {_bytes(card['weights_bytes'])}"),
        ("shape", f"{_count(card['n_layer'], 'layer')}, {_count(card['n_head'], 'head')}, {card['n_embd']:,} wide,"
                  f" MLP {card['n_inner']:,} wide"),
        ("context", f"{card['block_size']:,} tokens"),
        ("vocabulary", vocabulary),
        ("tokenizer", card["tokenizer"]),
        ("GELU", gelu),
        ("head", "tied to the embedding" if card["tied"] else "its own weights"),
        ("biases", "yes" if card["bias"] else "none"),
        ("LayerNorm", f"eps {card['layer_norm_eps']:g}"),
        ("chat", "template of its own" if card["chat_template"] else "no template"),
    ]  # fmt: skip
    if "weights_sha256" in card:
        rows.append(("SHA-256", card["weights_sha256"]))
    rows += [("notes" if i == 0 else "", note) for i, note in enumerate(card["notes"])]
    if "proof" in card:
        rows.append(("proof", _proof_line(card["proof"], loss)))
    return [f"{label:<12}{text}" for label, text in rows]


def _proof_line(proof: dict[str, Any], recorded: float | None) -> str:
    computed = f"loss {proof['loss']:.4f} on {proof['predictions']:,} tokens of {proof['text']}"
    how = f"computed by {proof['runner']} on {proof['device']} in {proof['arithmetic']}"
    return f"{computed}, {how}; recorded in the file: {'none' if recorded is None else f'{recorded:.4f}'}"


def _proof(args: argparse.Namespace) -> dict[str, Any]:
    """The mean loss in nats over windows of the context's length, by the runner that would serve the model."""
    if args.proof_tokens < _MIN_PREDICTIONS:
        raise InvalidRequest(f"--proof-tokens is {args.proof_tokens}; it must be {_MIN_PREDICTIONS} at least.")
    text = _read(args.proof)
    with open_model(args) as llm:
        token_ids = llm.tokenizer.encode(text)[: args.proof_tokens + 1]
        if len(token_ids) <= _MIN_PREDICTIONS:
            raise InvalidRequest(f"{args.proof} has only {len(token_ids):,} tokens.", remedy="Give a longer text.")
        loss = mean_loss(llm, token_ids)
        how = {key: llm.card[key] for key in ("runner", "precision", "arithmetic", "device")}
    return {"loss": loss, "predictions": len(token_ids) - 1, "text": args.proof, **how}


def mean_loss(llm: LLM, token_ids: list[int]) -> float:
    """Mean negative log probability of the tokens but the first, window by window without overlap."""
    import numpy as np

    window = llm.config.block_size
    total = 0.0
    for start in range(0, len(token_ids) - 1, window):
        piece = token_ids[start : start + window + 1]
        logits = np.asarray(llm.logits(piece[:-1]), np.float64)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        total += float((log_sum - logits[np.arange(len(piece) - 1), piece[1:]]).sum())
        if sys.stderr.isatty():
            print(f"\rproof: {start + len(piece) - 1:,} of {len(token_ids) - 1:,}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return total / (len(token_ids) - 1)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 at byte {error.start}.") from None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _bytes(count: int) -> str:
    size, units = float(count), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:,.1f} {units[0]}" if units[0] != "bytes" else f"{count} bytes"
