"""``nanogpt quantize``: a receipt of what int8 and int4 cost a model, and the plan by which int4 keeps to a limit.

Says, for a text, the loss in float32, int8, int4 and in the mixture that serving takes, with sizes and speeds. Whoever
serves the weights packs them; what is kept here is which matrices stay in int8 under ``--precision int4``
(``nanogpt/runner/int4_plan.py``). Exits 1 where int8 or the mixture costs more than allowed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.errors import InvalidRequest, UnknownCharacter
from nanogpt.settings import Settings

if TYPE_CHECKING:
    from nanogpt.checkpoint.types import Checkpoint

HELP = "measure what int8 and int4 cost a model's loss, and plan int4 within a limit"
_TEXT = Path(__file__).parent.parent / "assets" / "text" / "shakespeare.txt"
_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="FILE", nargs="?", help="a checkpoint of any family (default: what is served)"
    )
    parser.add_argument(
        "--text",
        metavar="TEXTFILE",
        help="text to compute the loss on, best of the model's own kind (default: Shakespeare)",
    )
    parser.add_argument(
        "--tokens", type=int, default=_TOKENS, metavar="N", help=f"predictions at most (default {_TOKENS})"
    )
    parser.add_argument(
        "--max-loss", type=float, default=0.5, metavar="PERCENT", help="perplexity that int8 may cost (default 0.5)"
    )
    parser.add_argument(
        "--max-int4-loss", type=float, default=0.5, metavar="PERCENT",
        help="perplexity that int4 may cost: as many matrices stay in int8 as that takes (default 0.5)",
    )  # fmt: skip
    parser.add_argument("--no-plan", action="store_true", help="measure only: write nothing beside the checkpoint")
    parser.add_argument(
        "--no-sensitivity", action="store_true", help="leave out the matrices one by one, and with them the plan"
    )
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")
    parser.add_argument("--tokenizer", help="gpt2, or a path; default: detected")
    parser.add_argument("--threads", type=int, help="threads; default: as many as the container may use")
    parser.epilog = (
        "example, int4 for at most 0.25 % more perplexity on a text that the model has not seen:\n"
        "  nanogpt quantize log/model_40000.pt --text val.txt --max-int4-loss 0.25\n"
        "  nanogpt serve log/model_40000.pt --precision int4"
    )


def run(args: argparse.Namespace) -> int:
    from nanogpt.checkpoint import load_checkpoint
    from nanogpt.eval.quantization import MIN_PREDICTIONS
    from nanogpt.runner.int4_plan import require_place, write_plan

    if args.tokens < MIN_PREDICTIONS:
        raise InvalidRequest(f"--tokens is {args.tokens}; it must be {MIN_PREDICTIONS} at least.", field="tokens")
    flags = {"model_checkpoint": args.checkpoint, "tokenizer": args.tokenizer, "threads": args.threads}
    settings = Settings.load(flags)
    checkpoint = load_checkpoint(settings.model_checkpoint, tokenizer=settings.tokenizer)
    keep = not (args.no_plan or args.no_sensitivity)
    if keep:
        require_place(checkpoint)  # now, not after minutes of measuring
    receipt = _receipt(checkpoint, args, settings.threads)
    receipt["plan"] = None
    try:
        if keep and receipt["int4_accepted"]:
            row, about = receipt["mixed"], ("text", "num_predictions", "max_int4_loss_percent")
            measured = {"perplexity_percent": row["perplexity_percent"], **{name: receipt[name] for name in about}}
            receipt["plan"] = str(write_plan(checkpoint, row["int8_matrices"], measured))
    finally:  # what was measured is told, also where the plan could not be written
        print(json.dumps(receipt, indent=2) if args.json else "\n".join(_render(receipt)))
    return 0 if receipt["accepted"] and receipt["int4_accepted"] is not False else 1


def _receipt(checkpoint: Checkpoint, args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Everything that is measured, and judged. ``int4_accepted`` is None where no mixture was looked for."""
    from nanogpt.eval.quantization import Scale, choose_int8

    try:
        scale = Scale(checkpoint, _text(args.text), args.tokens, threads)
    except UnknownCharacter as error:
        if args.text is not None:
            raise
        raise InvalidRequest(
            f"{checkpoint.name} cannot read the text that is measured by default: {error.message}",
            remedy="Give --text with a file of the kind that the model was trained on.",
            field="text",
        ) from None
    whole = {}
    for precision in ("fp32", "int8", "int4"):
        _progress(f"all in {precision}")
        whole[precision] = scale.whole(precision)
    base = whole["fp32"]
    receipt: dict[str, Any] = {
        "model": checkpoint.name,
        "text": args.text or "the embedded text (Shakespeare)",
        "num_predictions": scale.num_predictions,
        **{precision: measured.row(base) for precision, measured in whole.items()},
        "max_loss_percent": args.max_loss,
        "accepted": _within(whole["int8"].perplexity_percent(base), args.max_loss),
        "max_int4_loss_percent": args.max_int4_loss,
        "int4_accepted": None,
    }
    if not args.no_sensitivity:
        sensitivity = {}
        for i, name in enumerate(scale.names):
            _progress(f"int4 in one matrix, {i + 1} of {len(scale.names)}")
            sensitivity[name] = scale.sensitivity(name, whole["int8"])
        receipt["int4_sensitivity_percent"] = sensitivity
        mixtures = {frozenset[str](): whole["int4"], frozenset(scale.names): whole["int8"]}

        def meets(int8: frozenset[str]) -> bool:
            if int8 not in mixtures:
                _progress(f"{len(int8)} of {len(scale.names)} matrices in int8")
                mixtures[int8] = scale.mixed(int8)
            return _within(mixtures[int8].perplexity_percent(base), args.max_int4_loss)

        saved = {name: scale.saved_bytes(name) for name in scale.names}
        chosen = choose_int8(scale.names, sensitivity, saved, meets)
        receipt["int4_accepted"] = chosen is not None
        if chosen is not None:
            kept = [name for name in scale.names if name in chosen]
            receipt["mixed"] = {
                **mixtures[chosen].row(base), "int8_matrices": kept, "num_matrices": len(scale.names)
            }  # fmt: skip
    _progress("")
    return receipt


def _within(percent: float, limit: float) -> bool:
    return percent <= limit  # False for NaN, too


def _text(path: str | None) -> str:
    try:
        return Path(_TEXT if path is None else path).read_text("utf-8")
    except OSError as error:
        raise InvalidRequest(f"Cannot read the text {path}: {error.strerror or error}.", field="text") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The text {path} is not UTF-8 at byte {error.start}.", field="text") from None


def _render(receipt: dict[str, Any]) -> list[str]:
    lines = [f"{receipt['model']}: {receipt['num_predictions']:,} predictions on {receipt['text']}", ""]
    lines.append(f"{'':6}{'loss':>10}{'perplexity':>22}{'packed':>13}{'scored':>14}{'written':>14}")
    for precision in ("fp32", "int8", "int4", "mixed"):
        row = receipt.get(precision)
        if row is not None:
            perplexity = (
                "" if precision == "fp32" else f"{row['perplexity_percent']:+.3f}% ± {row['margin_percent']:.3f}"
            )
            lines.append(
                f"{precision:6}{row['loss']:10.6f}{perplexity:>22}{row['packed_bytes'] / 1e6:10.2f} MB"
                f"{row['tokens_per_s']:8.0f} tok/s{row['decode_tokens_per_s']:8.0f} tok/s"
            )
    sensitivity = receipt.get("int4_sensitivity_percent", {})
    worst = sorted(((name, percent) for name, percent in sensitivity.items() if percent > 0), key=lambda item: -item[1])
    if worst:
        lines += ["", "matrices that int4 alone hurts most (perplexity):"]
        lines += [f"  {percent:+8.3f}%  {name}" for name, percent in worst[:8]]
    return [*lines, "", *_verdicts(receipt)]


def _verdicts(receipt: dict[str, Any]) -> list[str]:
    allowed = f"at most {receipt['max_loss_percent']:g} % is allowed"
    lines = [f"int8 is {'accepted' if receipt['accepted'] else 'REFUSED'}: {allowed}"]
    if receipt["int4_accepted"] is None:
        return lines
    limit, mixed = f"at most {receipt['max_int4_loss_percent']:g} % is allowed", receipt.get("mixed")
    if mixed is None:
        lines.append(f"int4 is REFUSED: {limit}, and int8 in every matrix costs more")
    else:
        names = mixed["int8_matrices"]
        how = f"with {len(names)} of {mixed['num_matrices']} matrices in int8" if names else "in every matrix"
        lines.append(f"int4 is accepted, {how} (the mixed row): {limit}")
        lines += [f"  {name} stays in int8" for name in names]
        highest = mixed["perplexity_percent"] + mixed["margin_percent"]
        if highest > receipt["max_int4_loss_percent"]:
            lines.append(f"  its 95 % interval ends at {highest:+.3f} %: more text (--text, --tokens) tells it better")
    kept = receipt["plan"]
    lines.append(f"plan: {kept}; --precision int4 follows it" if kept else "no plan was written")
    return lines


def _progress(what: str) -> None:
    """What is being measured, on standard error where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)
