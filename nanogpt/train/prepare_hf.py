"""``nanogpt prepare hf``: a data set of the Hugging Face hub, or a local folder of its files, as token shards.

Documents are streamed: nothing but the shards is kept. After each shard a small state is written, and the same command
run again goes on behind the last whole document of the last whole shard. The first shard is for validation, as in
build-nanogpt. Needs the package ``datasets``, not PyTorch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from nanogpt.errors import InvalidRequest, MissingDependency
from nanogpt.tokenizer import Tokenizer, load_tokenizer
from nanogpt.train.dataset import FILE, write_atomically, write_dataset
from nanogpt.train.prepare import Writer, start_folder, tokenized
from nanogpt.train.shards import Tokens, dtype_for

STATE: Final = "unfinished.json"
_LOCAL: Final = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv"}


def prepare_hf(
    name_or_path: str,
    folder: Path,
    *,
    name: str | None,
    split: str,
    column: str,
    tokenizer: str,
    shard_tokens: int,
    max_tokens: int = 0,
) -> dict[str, Any]:
    """Writes a folder from a streamed data set. Returns what a user is told.

    Raises: MissingDependency, InvalidRequest, TokenizerError, OSError.
    """
    chosen = load_tokenizer(tokenizer)
    asked = {
        "dataset": name_or_path, "name": name, "split": split, "column": column, "tokenizer": tokenizer,
        "shard_tokens": shard_tokens,
    }  # fmt: skip
    progress = _Progress(folder, asked)
    for tokens, documents in _shards(
        _documents(name_or_path, name, split, column, skip=progress.documents),
        chosen,
        shard_tokens,
        max_tokens,
        progress,
    ):
        progress.shard(tokens, documents)
    if not progress.files["train"]:
        raise InvalidRequest(
            f"{name_or_path} fills less than two shards of {shard_tokens:,} tokens: nothing is left to train on.",
            remedy="Give a smaller --shard-tokens.",
            field="shard_tokens",
        )
    write_dataset(
        folder, chosen, progress.files, progress.num_tokens, kind="text", num_bytes=progress.num_bytes, source=asked
    )
    (folder / STATE).unlink(missing_ok=True)
    return {
        "folder": str(folder), "tokenizer": chosen.name, "vocabulary": chosen.num_tokens,
        "tokens": progress.num_tokens, "notes": [f"{progress.documents:,} documents of {name_or_path}"],
    }  # fmt: skip


class _Progress:
    """What is on the disk already, and how the terminal hears of it."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self._folder, self._asked = folder, asked
        self.documents = self.num_bytes = 0
        self.files: dict[str, dict[str, str]] = {"train": {}, "val": {}}
        self.num_tokens = {"train": 0, "val": 0}
        self._start, self._new_tokens = time.monotonic(), 0
        state = folder / STATE
        if not state.exists() or (folder / FILE).exists():
            start_folder(folder)
            return
        value = json.loads(state.read_bytes())
        if value["asked"] != asked:
            differing = [key for key in asked if value["asked"].get(key) != asked[key]]
            raise InvalidRequest(
                f"{folder} was begun with other arguments: {', '.join(differing)} differ.",
                remedy="Run the same command again to go on with it, or remove the folder.",
                field="out",
            )
        self.documents, self.num_bytes = value["documents"], value["bytes"]
        self.files, self.num_tokens = value["files"], value["tokens"]
        print(f"Going on behind {self.documents:,} documents.", file=sys.stderr, flush=True)

    def shard(self, tokens: Tokens, documents: int) -> None:
        """One more shard is complete; ``documents`` are in the shards so far."""
        done = sum(map(len, self.files.values()))
        split = "train" if done else "val"
        writer = Writer(self._folder, split, tokens.dtype, len(tokens), first=len(self.files[split]))
        writer.add(tokens)
        writer.flush()
        self.files[split] |= writer.files
        self.num_tokens[split] += len(tokens)
        self.documents = documents
        self._new_tokens += len(tokens)
        state = {"asked": self._asked, "documents": documents, "bytes": self.num_bytes, "files": self.files,
                 "tokens": self.num_tokens}  # fmt: skip
        write_atomically(self._folder / STATE, json.dumps(state) + "\n")
        rate, total = self._new_tokens / max(1e-9, time.monotonic() - self._start), sum(self.num_tokens.values())
        print(
            f"shard {done + 1}: {total:,} tokens of {documents:,} documents, {rate:,.0f} a second",
            file=sys.stderr,
            flush=True,
        )


def _shards(
    documents: Iterator[str], tokenizer: Tokenizer, shard_tokens: int, max_tokens: int, progress: _Progress
) -> Iterator[tuple[Tokens, int]]:
    """Tokens of a shard, and how many documents of the data set are behind it.

    A shard ends with the document that fills it: nothing of it has to be remembered when the work is taken up again.
    """
    parts: list[Tokens] = []
    filled = 0
    dtype = dtype_for(tokenizer.num_tokens)
    number = progress.documents
    total = sum(progress.num_tokens.values())
    for text in documents:
        if max_tokens and total >= max_tokens:
            break
        for ids in tokenized(tokenizer, text):
            parts.append(np.asarray(ids, dtype))
            filled += len(ids)
            total += len(ids)
        number += 1
        progress.num_bytes += len(text.encode("utf-8"))
        if filled >= shard_tokens:
            yield np.concatenate(parts), number
            parts, filled = [], 0
    if parts:
        yield np.concatenate(parts), number


def _documents(name_or_path: str, name: str | None, split: str, column: str, *, skip: int) -> Iterator[str]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingDependency(
            "prepare hf needs the package datasets, which is not installed.",
            remedy="pip install datasets; or prepare text, which needs nothing.",
        ) from None
    path = Path(name_or_path)
    try:
        if path.exists():
            kind, files = _local_files(path)
            stream = datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=True)
        else:
            stream = datasets.load_dataset(name_or_path, name, split=split, streaming=True)
        for row in stream.skip(skip):
            text = row.get(column)
            if not isinstance(text, str):
                raise InvalidRequest(
                    f"{name_or_path} has no text in the column {column!r}; it has {', '.join(row)}.",
                    remedy="Name it with --column.",
                    field="column",
                )
            yield text
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InvalidRequest(f"Cannot read the data set {name_or_path}: {error}", field="sources") from None


def _local_files(path: Path) -> tuple[str, list[str]]:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for ending, kind in _LOCAL.items():
        found = [str(file) for file in files if file.suffix == ending]
        if found:
            return kind, found
    raise InvalidRequest(f"{path} holds no {', '.join(_LOCAL)} file.", field="sources")
