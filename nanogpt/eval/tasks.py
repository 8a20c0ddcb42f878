"""The evaluations: ``loss``, ``hellaswag`` and ``lambada`` on local files. Each gives a plain dictionary of results.

HellaSwag is scored as in build-nanogpt: the ending whose tokens have the highest mean log probability. LAMBADA's last
word is right when each of its tokens is the model's first choice.
"""

from __future__ import annotations

import bz2
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nanogpt.errors import InvalidRequest
from nanogpt.eval.scoring import continuation_logprobs, estimate, following_logprobs, start_tokens

if TYPE_CHECKING:
    from nanogpt.llm import LLM

Progress = Callable[[str, int, int], None]
"""Told the task's name, how much is done, and of how much."""

_ENDINGS: Final = 4
_LN2: Final = math.log(2)


@dataclass(frozen=True, slots=True)
class HellaSwagItem:
    context: str
    endings: tuple[str, ...]
    label: int


def evaluate_loss(llm: LLM, path: Path, *, limit: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Mean loss of a text, window by window of the context's length, without overlap; ``limit`` tokens (0: all).

    Windows are taken as independent observations for the confidence interval.

    Raises: InvalidRequest when the text is too short or cannot be tokenized.
    """
    token_ids = llm.tokenizer.encode(_text(path))
    if limit:
        token_ids = token_ids[: limit + 1]
    if len(token_ids) < 2:
        raise InvalidRequest(f"{path} has {len(token_ids)} tokens; a loss needs two.", field="loss")
    window, total = llm.config.block_size, len(token_ids) - 1
    means, counts = [], []
    for start in range(0, total, window):
        piece = token_ids[start : start + window + 1]
        logprobs, _ = following_logprobs(llm, piece)
        means.append(-float(logprobs.mean()))
        counts.append(float(len(logprobs)))
        if progress is not None:
            progress("loss", min(start + window, total), total)
    loss = estimate(means, counts)
    num_bytes = sum(len(llm.tokenizer.token_bytes(token)) for token in token_ids[1:])
    per_byte = total / num_bytes / _LN2 if num_bytes else math.nan
    return {
        "task": "loss",
        "file": str(path),
        "tokens": total,
        "bytes": num_bytes,
        "loss": loss.mean,
        "loss_margin": loss.margin,
        "bits_per_byte": loss.mean * per_byte,
        "bits_per_byte_margin": loss.margin * per_byte,
        "perplexity": _exp(loss.mean),
        "perplexity_low": _exp(loss.mean - loss.margin),
        "perplexity_high": _exp(loss.mean + loss.margin),
    }


def evaluate_hellaswag(llm: LLM, path: Path, *, limit: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Accuracy by the mean, and by the sum, of the endings' log probabilities. ``limit`` items (0: all).

    Raises: InvalidRequest when the file is none of HellaSwag's.
    """
    items = read_hellaswag(path)[: limit or None]
    normalised, plain = [], []
    for i, item in enumerate(items):
        context = llm.tokenizer.encode(item.context)
        scores = [continuation_logprobs(llm, context, llm.tokenizer.encode(" " + ending))[0] for ending in item.endings]
        means = [float(score.mean()) for score in scores]
        sums = [float(score.sum()) for score in scores]
        normalised.append(float(means.index(max(means)) == item.label))
        plain.append(float(sums.index(max(sums)) == item.label))
        if progress is not None:
            progress("hellaswag", i + 1, len(items))
    by_mean, by_sum = estimate(normalised), estimate(plain)
    return {
        "task": "hellaswag",
        "file": str(path),
        "items": len(items),
        "accuracy_norm": by_mean.mean,
        "accuracy_norm_margin": by_mean.margin,
        "accuracy": by_sum.mean,
        "accuracy_margin": by_sum.margin,
    }


def evaluate_lambada(llm: LLM, path: Path, *, limit: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """How often the last word of a passage is predicted, and its perplexity. ``limit`` passages (0: all).

    Raises: InvalidRequest when the file is none of LAMBADA's.
    """
    passages = read_lambada(path)[: limit or None]
    right, losses = [], []
    for i, passage in enumerate(passages):
        context, _, word = passage.rpartition(" ")
        context_ids = [*start_tokens(llm), *llm.tokenizer.encode(context)]
        logprobs, greedy = continuation_logprobs(llm, context_ids, llm.tokenizer.encode(" " + word))
        right.append(float(greedy.all()))
        losses.append(-float(logprobs.sum()))
        if progress is not None:
            progress("lambada", i + 1, len(passages))
    accuracy, loss = estimate(right), estimate(losses)
    return {
        "task": "lambada",
        "file": str(path),
        "passages": len(passages),
        "accuracy": accuracy.mean,
        "accuracy_margin": accuracy.margin,
        "perplexity": _exp(loss.mean),
        "perplexity_low": _exp(loss.mean - loss.margin),
        "perplexity_high": _exp(loss.mean + loss.margin),
    }


def read_hellaswag(path: Path) -> list[HellaSwagItem]:
    """The original JSON lines (``ctx``, ``endings``, ``label``), or llama.cpp's six lines an item; also bz2.

    Raises: InvalidRequest naming the line.
    """
    lines = _text(path).split("\n")
    if lines and lines[0].startswith("{"):
        return [_hellaswag_object(where, value) for where, value in _objects(lines, path)]
    while lines and not lines[-1]:
        lines.pop()
    step = 2 + _ENDINGS
    if not lines or len(lines) % step:
        raise InvalidRequest(
            f"{path} has {len(lines)} lines; HellaSwag's text has {step} an item: context, label, four endings.",
            field="hellaswag",
        )
    items = []
    for i in range(0, len(lines), step):
        if lines[i + 1] not in ("0", "1", "2", "3"):
            raise InvalidRequest(f"Line {i + 2} of {path} is {lines[i + 1][:40]!r}, not a label from 0 to 3.")
        items.append(HellaSwagItem(lines[i], tuple(lines[i + 2 : i + step]), int(lines[i + 1])))
    return items


def read_lambada(path: Path) -> list[str]:
    """The passages of a file of JSON lines with ``text``.

    Raises: InvalidRequest naming the line.
    """
    passages = []
    for where, value in _objects(_text(path).split("\n"), path):
        passage = value.get("text")
        if not isinstance(passage, str) or " " not in passage.strip():
            raise InvalidRequest(f"{where} has no passage under text.", field="lambada")
        passages.append(passage.strip())
    if not passages:
        raise InvalidRequest(f"{path} holds no passage.", field="lambada")
    return passages


def _hellaswag_object(where: str, value: dict[str, Any]) -> HellaSwagItem:
    context, endings, label = value.get("ctx"), value.get("endings"), value.get("label")
    if isinstance(context, str) and isinstance(endings, list) and all(isinstance(ending, str) for ending in endings):
        number = int(label) if isinstance(label, (int, str)) and str(label).isdecimal() else -1
        if 0 <= number < len(endings):
            return HellaSwagItem(context, tuple(endings), number)
    raise InvalidRequest(f"{where} is no HellaSwag item: it needs ctx, endings and label.", field="hellaswag")


def _objects(lines: list[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"Line {number} of {path}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise InvalidRequest(f"{where} is not JSON: {error}.") from None
            if not isinstance(value, dict):
                raise InvalidRequest(f"{where} holds no JSON object.")
            yield where, value


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (bz2.decompress(data) if data.startswith(b"BZh") else data).decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 at byte {error.start}.") from None


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def without_infinities(result: dict[str, Any]) -> dict[str, Any]:
    """A result as JSON can carry it: null for what one observation does not tell."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
