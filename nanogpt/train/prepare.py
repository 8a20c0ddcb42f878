"""Text in, token shards out: ``nanogpt prepare text`` and the writer that every kind of preparation shares.

Documents go through a ``Writer``, which cuts them into shards of a fixed size and puts the end-of-text token in front
of each, as build-nanogpt does. Needs no PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from nanogpt.errors import InvalidRequest
from nanogpt.tokenizer import Tokenizer, characters, gpt2, load_tokenizer
from nanogpt.tokenizer.huggingface import HuggingFaceTokenizer
from nanogpt.train.dataset import FILE, write_dataset
from nanogpt.train.shards import Tokens, dtype_for, write_shard

END_OF_TEXT: Final = "<|endoftext|>"
# Pieces of a long text that are tokenized at a time, cut at line breaks: a BPE's memory grows with the piece.
_PIECE_CHARS: Final = 1 << 20
_MIN_TOKENS: Final = 2


class Writer:
    """Collects the tokens of one split and writes full shards as they fill."""

    def __init__(self, folder: Path, split: str, dtype: Any, shard_tokens: int, first: int = 0) -> None:
        self.files: dict[str, str] = {}
        self.num_tokens = 0
        self._folder, self._split, self._first = folder, split, first
        self._buffer = np.empty(shard_tokens, dtype)
        self._filled = 0

    def add(self, tokens: Sequence[int] | Tokens) -> None:
        values = np.asarray(tokens, dtype=self._buffer.dtype)
        while len(values):
            taken = values[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            values = values[len(taken) :]
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write what has been collected, if anything."""
        if self._filled:
            name = f"{self._split}_{self._first + len(self.files):06d}.bin"
            self.files[name] = write_shard(self._folder / name, self._buffer[: self._filled])
            self.num_tokens += self._filled
            self._filled = 0


def prepare_text(
    paths: Sequence[Path], folder: Path, *, tokenizer: str, vocab_size: int, val_fraction: float, shard_tokens: int
) -> dict[str, Any]:
    """Writes a folder from text files: of each the last ``val_fraction`` is for validation, as nanoGPT does it.

    ``tokenizer``: gpt2, characters, bpe (trained here, ``vocab_size`` tokens), or a tokenizer's path. Returns what a
    user is told.

    Raises: InvalidRequest naming the file; TokenizerError; OSError.
    """
    texts = [read_text(path) for path in paths]
    splits = [_split(text, val_fraction) for text in texts]
    if not any(train for train, _ in splits):
        raise InvalidRequest("There is no text to train on.", field="files")
    # All characters, but pairs learned from the training split only: what validation holds is not to be known.
    chosen = (
        characters(sorted(set("".join(texts))))
        if tokenizer == "characters"
        else make_tokenizer(tokenizer, (train for train, _ in splits), vocab_size)
    )
    start_folder(folder)
    files: dict[str, dict[str, str]] = {}
    counts: dict[str, int] = {}
    for i, split in enumerate(("train", "val")):
        writer = Writer(folder, split, dtype_for(chosen.num_tokens), shard_tokens)
        for parts in splits:
            for ids in tokenized(chosen, parts[i]):
                writer.add(ids)
        writer.flush()
        files[split], counts[split] = writer.files, writer.num_tokens
    if counts["train"] < _MIN_TOKENS:
        raise InvalidRequest(f"The text has {counts['train']} tokens to train on; that is no text.", field="files")
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    source: dict[str, Any] = {"files": [path.name for path in paths], "bytes": num_bytes}
    write_dataset(folder, chosen, files, counts, kind="text", num_bytes=num_bytes, source=source)
    return {"folder": str(folder), "tokenizer": chosen.name, "vocabulary": chosen.num_tokens, "tokens": counts}


def make_tokenizer(name: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer that a name means; ``bpe`` is trained on the texts."""
    if name == "gpt2":
        return gpt2()
    if name == "bpe":
        return train_bpe(texts, vocab_size)
    return load_tokenizer(name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE in GPT-2's manner, with an end-of-text token; the same texts give the same one.

    Raises: InvalidRequest when the vocabulary has no room for all bytes.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise InvalidRequest(
            f"vocab_size is {vocab_size}; a BPE needs 257 at least: every byte and the end of text.", field="vocab_size"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    text = backend.to_str()
    return HuggingFaceTokenizer(
        text, json.loads(text), name="tokenizer.json", eos_token=END_OF_TEXT, source="the trained tokenizer"
    )


def tokenized(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """The token ids of one document, piece by piece, the end-of-text token in front where there is one."""
    if text and tokenizer.eos_token_id is not None:
        yield [tokenizer.eos_token_id]
    for piece in pieces(text):
        yield tokenizer.encode(piece)


def pieces(text: str) -> Iterator[str]:
    """The text in pieces that end before a line break: no BPE of GPT-2's kind joins a line break to the text before."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start + 1, start + _PIECE_CHARS)
        # A line break within a run of white space would be a border within a word.
        while end > start and (text[end - 1].isspace() or text[end + 1 : end + 2].isspace()):
            end = text.rfind("\n", start + 1, end)
        end = end if end > start else start + _PIECE_CHARS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def start_folder(folder: Path) -> None:
    """Makes the folder; one that holds prepared data is refused, leftovers of an attempt that did not end are removed.

    Raises: InvalidRequest; OSError.
    """
    if (folder / FILE).exists():
        raise InvalidRequest(
            f"{folder} holds prepared data.", remedy="Name another folder, or remove that one first.", field="out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob("train_[0-9]*.bin"), *folder.glob("val_[0-9]*.bin"), *folder.glob(".*.tmp")]:
        leftover.unlink()


def read_text(path: Path) -> str:
    """Raises: InvalidRequest naming the file and what is wrong with it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.", field="files") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 at byte {error.start}.", field="files") from None


def _split(text: str, val_fraction: float) -> tuple[str, str]:
    at = int(len(text) * (1 - val_fraction))
    return text[:at], text[at:]
