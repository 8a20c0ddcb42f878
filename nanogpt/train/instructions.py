"""Instructions with answers (Dolly, Alpaca) as token shards in which the answers are marked.

An example is the text that the guide's project writes: the instruction, the context if there is one, and the answer,
which ends with the end-of-text token. Prompt and answer are tokenized apart: that is what ``chat`` sends, and what the
model goes on from. Needs no PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from nanogpt.chat_template import render
from nanogpt.checkpoint.chat import DOLLY
from nanogpt.errors import InvalidRequest
from nanogpt.tokenizer import Tokenizer, load_tokenizer
from nanogpt.train.dataset import write_dataset
from nanogpt.train.prepare import read_text, start_folder
from nanogpt.train.shards import ANSWER, FIRST, INSTRUCTIONS, Tokens, write_shard

# What the fields are called in Dolly and in Alpaca.
_CONTEXT: Final = ("context", "input")
_ANSWER: Final = ("response", "output")


@dataclass(frozen=True, slots=True)
class Example:
    instruction: str
    context: str
    answer: str


def prepare_instructions(paths: Sequence[Path], folder: Path, *, tokenizer: str, val_fraction: float) -> dict[str, Any]:
    """Writes a folder from JSON lines. Returns what a user is told.

    Raises: InvalidRequest naming the file and line; TokenizerError; OSError.
    """
    chosen = load_tokenizer(tokenizer)
    examples = [example for path in paths for example in read_examples(path)]
    start_folder(folder)
    files, counts = {}, {}
    for split, part in zip(("train", "val"), divide(examples, val_fraction), strict=True):
        tokens = encode(part, chosen)
        name = f"{split}_{0:06d}.bin"
        files[split] = {name: write_shard(folder / name, tokens, kind=INSTRUCTIONS)} if len(tokens) else {}
        counts[split] = len(tokens)
    num_bytes = sum(path.stat().st_size for path in paths)
    source = {"files": [path.name for path in paths], "examples": len(examples)}
    write_dataset(
        folder, chosen, files, counts, kind="instructions", num_bytes=num_bytes, source=source, chat_template=DOLLY
    )
    return {
        "folder": str(folder),
        "tokenizer": chosen.name,
        "vocabulary": chosen.num_tokens,
        "tokens": counts,
        "notes": [f"{len(examples):,} examples, in the template ### Instruction / ### Context / ### Response"],
    }


def read_examples(path: Path) -> list[Example]:
    """The examples of a file: JSON lines, or one JSON list.

    Raises: InvalidRequest naming the line and what is missing in it.
    """
    text = read_text(path)
    found = []
    for where, value in _values(text, path):
        if not isinstance(value, dict):
            raise InvalidRequest(f"{where} holds a {type(value).__name__}; an example is a JSON object.", field="data")
        instruction, answer = value.get("instruction"), _first(value, _ANSWER)
        if not isinstance(instruction, str) or not isinstance(answer, str):
            missing = "instruction" if not isinstance(instruction, str) else "response (or output)"
            raise InvalidRequest(
                f"{where} has no text as its {missing}; it has {', '.join(value)[:200] or 'nothing'}.",
                remedy='An example is {"instruction": …, "context": …, "response": …}.',
                field="data",
            )
        context = _first(value, _CONTEXT)
        found.append(Example(instruction.strip(), (context or "").strip(), answer.strip()))
    if not found:
        raise InvalidRequest(f"{path} holds no example.", field="data")
    return found


def divide(examples: Sequence[Example], val_fraction: float) -> tuple[list[Example], list[Example]]:
    """Every n-th example is for validation: files are often sorted by kind."""
    every = round(1 / val_fraction) if val_fraction else 0
    train = [example for i, example in enumerate(examples) if not every or i % every != every - 1]
    val = [example for i, example in enumerate(examples) if every and i % every == every - 1]
    return train, val


def encode(examples: Sequence[Example], tokenizer: Tokenizer) -> Tokens:
    """All examples end to end, as a shard of instructions holds them.

    Raises: InvalidRequest, UnknownCharacter where the tokenizer lacks what the template needs.
    """
    if tokenizer.eos_token_id is None:
        raise InvalidRequest(
            f"The tokenizer ({tokenizer.name}) has no end-of-text token, with which an answer ends.",
            remedy="Fine-tune a model with a BPE tokenizer: gpt2, or one that prepare text --tokenizer bpe trains.",
            field="tokenizer",
        )
    parts: list[int] = []
    end_of_text = tokenizer.decode([tokenizer.eos_token_id])
    for example in examples:
        messages = [{"role": "system", "content": example.context}] if example.context else []
        messages.append({"role": "user", "content": example.instruction})
        prompt = tokenizer.encode(render(DOLLY, messages, end_of_text=end_of_text))
        answer = [*tokenizer.encode(example.answer), tokenizer.eos_token_id]
        parts.append(prompt[0] | FIRST)
        parts += prompt[1:]
        parts += [token | ANSWER for token in answer]
    return np.array(parts, np.uint32)


def _values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            for i, value in enumerate(json.loads(text)):
                yield f"Entry {i + 1} of {path}", value
        except ValueError as error:
            raise InvalidRequest(f"{path} is not JSON: {error}.", field="data") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"Line {number} of {path}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise InvalidRequest(f"{where} is not JSON: {error}.", field="data") from None


def _first(value: dict[str, Any], names: Sequence[str]) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)
