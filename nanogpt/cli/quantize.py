"""``nanogpt quantize``: a receipt of what int8 and int4 cost a model, before it is served with them.

Computes nothing that serving does not compute anyway: the CPU runner packs weights by itself. Says, for a text, the
loss in float32, int8 and int4, sizes, speed, and which matrices int4 hurts; exits 1 where int8 costs more than allowed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import TYPE_CHECKING, Any

from nanogpt.errors import InvalidRequest, MissingDependency
from nanogpt.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nanogpt.checkpoint.types import Checkpoint
    from nanogpt.runner.native import NativeRunner

HELP = "measure what int8 and int4 cost a model's loss, and what they bring"
_TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way.\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="FILE", nargs="?", help="a checkpoint of any family (default: what is served)"
    )
    parser.add_argument("--text", metavar="TEXTFILE", help="text to compute the loss on (default: a short one)")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="predictions at most (default 4096)")
    parser.add_argument(
        "--max-loss", type=float, default=0.5, metavar="PERCENT", help="perplexity that int8 may cost (default 0.5)"
    )
    parser.add_argument("--no-sensitivity", action="store_true", help="leave out the matrices one by one")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")
    parser.add_argument("--tokenizer", help="gpt2, or a path; default: detected")
    parser.add_argument("--threads", type=int, help="threads; default: as many as the container may use")


def run(args: argparse.Namespace) -> int:
    from nanogpt.checkpoint import load_checkpoint

    flags = {"model_checkpoint": args.checkpoint, "tokenizer": args.tokenizer, "threads": args.threads}
    settings = Settings.load(flags)
    checkpoint = load_checkpoint(settings.model_checkpoint, tokenizer=settings.tokenizer)
    receipt = make_receipt(
        checkpoint, _text(args.text), args.tokens, settings.threads, sensitivity=not args.no_sensitivity
    )
    receipt["max_loss_percent"] = args.max_loss
    receipt["accepted"] = abs(receipt["int8"]["perplexity_percent"]) <= args.max_loss
    print(json.dumps(receipt, indent=2) if args.json else "\n".join(_render(receipt)))
    return 0 if receipt["accepted"] else 1


def make_receipt(
    checkpoint: Checkpoint, text: str, num_tokens: int, threads: int, *, sensitivity: bool
) -> dict[str, Any]:
    """Loss, size and speed in each precision, and the loss with each matrix alone in int4."""
    import numpy as np

    try:
        from nanogpt.runner.native import NativeRunner
    except ImportError as error:
        raise MissingDependency(
            f"The native runner is not part of this installation ({error}).",
            remedy="Install a C++ compiler and then nano-gpt-api again.",
        ) from None
    ids = np.array(checkpoint.tokenizer.encode(text)[: num_tokens + 1], np.int32)
    if len(ids) < 17:
        raise InvalidRequest(f"The text has {len(ids)} tokens; a loss needs 17 at least.", field="text")
    receipt: dict[str, Any] = {"model": checkpoint.name, "num_predictions": len(ids) - 1}

    def measure(precision: str, kinds: list[int] | None = None) -> dict[str, Any]:
        runner = NativeRunner(checkpoint, precision=precision, num_slots=1, threads=threads, kinds=kinds)
        started = time.perf_counter()
        loss = _loss(runner, ids)
        seconds = time.perf_counter() - started
        measured = {"loss": loss, "packed_bytes": runner.packed_bytes, "tokens_per_s": (len(ids) - 1) / seconds}
        runner.close()
        return measured

    for precision in ("fp32", "int8", "int4"):
        measured = measure(precision)
        receipt[precision] = measured
        measured["perplexity_percent"] = 100 * math.expm1(measured["loss"] - receipt["fp32"]["loss"])
    if sensitivity:
        from nanogpt.runner.native import matrix_names

        names = matrix_names(checkpoint.config)
        base = receipt["int8"]["loss"]
        receipt["int4_sensitivity_percent"] = {
            name: 100 * math.expm1(measure("int8", [2 if j == i else 1 for j in range(len(names))])["loss"] - base)
            for i, name in enumerate(names)
        }
    return receipt


def _loss(runner: NativeRunner, ids: npt.NDArray[np.int32]) -> float:
    """Mean nats a token, over windows of the context length."""
    import numpy as np

    total, count, window = 0.0, len(ids) - 1, runner.config.block_size
    for start in range(0, count, window):
        n = min(window, count - start)
        x = runner.logits(ids[start : start + n])[:, : runner.config.num_tokens].astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        total += float((np.log(np.exp(x).sum(axis=1)) - x[np.arange(n), ids[start + 1 : start + n + 1]]).sum())
    return total / count


def _text(path: str | None) -> str:
    if path is None:
        return _TEXT
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"Cannot read the text {path}: {error}.", field="text") from None


def _render(receipt: dict[str, Any]) -> list[str]:
    lines = [f"{receipt['model']}, {receipt['num_predictions']} predictions", ""]
    lines.append(f"{'':6}{'loss':>10}{'perplexity':>12}{'packed':>10}{'scored':>14}")
    for precision in ("fp32", "int8", "int4"):
        row = receipt[precision]
        lines.append(
            f"{precision:6}{row['loss']:10.6f}{row['perplexity_percent']:+11.3f}%{row['packed_bytes'] / 1e6:7.1f} MB"
            f"{row['tokens_per_s']:8.0f} tok/s"
        )
    worst = sorted(receipt.get("int4_sensitivity_percent", {}).items(), key=lambda item: -abs(item[1]))[:8]
    if worst:
        lines += ["", "matrices that int4 alone hurts most (perplexity):"]
        lines += [f"  {percent:+8.3f}%  {name}" for name, percent in worst]
    verdict = "accepted" if receipt["accepted"] else "REFUSED"
    lines += ["", f"int8 is {verdict}: at most {receipt['max_loss_percent']:g} % is allowed"]
    return lines
