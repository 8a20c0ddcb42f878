"""A prepared folder: ``train_000000.bin`` …, ``val_000000.bin`` …, and ``dataset.json`` with the tokenizer.

``dataset.json`` is written last, so a folder that has one is whole. Knows files and tokenizers, not batches.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nanogpt.errors import InvalidRequest
from nanogpt.tokenizer import Tokenizer, tokenizer_from_spec
from nanogpt.train.shards import Shard, open_shard

FILE: Final = "dataset.json"
FORMAT: Final = 1
SPLITS: Final = ("train", "val")


@dataclass(frozen=True)
class Dataset:
    """``files`` names every shard of a split and its SHA-256, in order."""

    folder: Path
    tokenizer: Tokenizer
    kind: str
    files: dict[str, dict[str, str]]
    num_tokens: dict[str, int]
    bytes_per_token: float
    chat_template: str | None = None

    def open(self, split: str) -> list[Shard]:
        """The shards of a split, checked.

        Raises: InvalidRequest naming a shard that is missing, damaged or another one.
        """
        shards = []
        for name, sha256 in self.files[split].items():
            shard = open_shard(self.folder / name)
            if shard.sha256 != sha256:
                raise InvalidRequest(
                    f"{shard.path} is not the shard that {FILE} names.", remedy="Prepare the data again.", field="data"
                )
            shards.append(shard)
        return shards


def write_dataset(
    folder: Path,
    tokenizer: Tokenizer,
    files: dict[str, dict[str, str]],
    num_tokens: dict[str, int],
    *,
    kind: str,
    num_bytes: int,
    source: dict[str, Any],
    chat_template: str | None = None,
) -> None:
    """Writes ``dataset.json``, atomically. ``source`` says where the text came from, for people.

    Raises: OSError.
    """
    value = {
        "format": FORMAT,
        "kind": kind,
        "tokens": num_tokens,
        "bytes_per_token": num_bytes / max(1, sum(num_tokens.values())),
        "shards": files,
        "source": source,
        "chat_template": chat_template,
        "tokenizer": tokenizer.to_spec(),
    }
    write_atomically(folder / FILE, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def open_dataset(folder: Path) -> Dataset:
    """The prepared data of a folder.

    Raises: InvalidRequest when it is none, or not whole; TokenizerError.
    """
    path = folder / FILE
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        unfinished = any(folder.glob("*_[0-9]*.bin"))
        raise InvalidRequest(
            f"{folder} holds no prepared data: cannot read {path} ({error.strerror}).",
            remedy="Its preparation did not end: run the same command again."
            if unfinished
            else "nanogpt prepare text FILES --out FOLDER makes it.",
            field="data",
        ) from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is damaged: not JSON ({error}).", field="data") from None
    try:
        if value["format"] != FORMAT:
            raise InvalidRequest(
                f"{path} has the format {value['format']}; this version reads {FORMAT}.",
                remedy="Prepare the data again.",
                field="data",
            )
        return Dataset(
            folder,
            tokenizer_from_spec(value["tokenizer"]),
            str(value["kind"]),
            {split: dict(value["shards"][split]) for split in SPLITS},
            {split: int(value["tokens"][split]) for split in SPLITS},
            float(value["bytes_per_token"]),
            value["chat_template"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{path} is damaged: {type(error).__name__} at {error}.", field="data") from None


def write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
