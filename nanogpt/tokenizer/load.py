"""Which tokenizer a name, a file, a folder or a spec means. Nothing is guessed: what is not recognised is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt.errors import TokenizerError
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.bpe import LLMC_MAGIC, from_llmc, from_llmc_spec, gpt2
from nanogpt.tokenizer.characters import characters_from_meta, from_characters_object
from nanogpt.tokenizer.files import parse_object, read_text
from nanogpt.tokenizer.huggingface import from_huggingface_spec, from_tokenizer_object, from_vocab_merges

_KNOWN = "gpt2, or a path to meta.pkl, characters.json, tokenizer.json, vocab.json with merges.txt, or llm.c's file"


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that is meant: ``gpt2``, or a file or folder of one of the kinds that are known.

    Raises: TokenizerError when there is none, more than one, or one of a kind that is not known; what the readers
    of the files raise.
    """
    if os.fspath(name_or_path) == "gpt2":
        return gpt2()
    path = Path(name_or_path)
    if path.is_dir():
        return _load_file(_find(path))
    if not path.exists():
        raise TokenizerError(f"There is no tokenizer {path}.", remedy=f"Name {_KNOWN}.", field="tokenizer")
    return _load_file(path)


def tokenizer_from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose ``to_spec`` this is. Touches no files but the package's own."""
    kind = spec.get("kind")
    if kind == "gpt2":
        return gpt2()
    if kind == "characters":
        return from_characters_object(spec, "the tokenizer's description")
    if kind == "llm.c":
        return from_llmc_spec(spec)
    if kind == "huggingface":
        return from_huggingface_spec(spec)
    raise TokenizerError(f"A tokenizer of the kind {kind!r} is not known.", remedy="Do all processes run one version?")


def _find(folder: Path) -> Path:
    found = [folder / name for name in ("tokenizer.json", "characters.json", "meta.pkl") if (folder / name).is_file()]
    vocabulary = folder / "vocab.json"
    # Beside a tokenizer.json these two are the same tokenizer in its older form.
    if vocabulary.is_file() and (folder / "merges.txt").is_file() and folder / "tokenizer.json" not in found:
        found.append(vocabulary)
    found += [path for path in sorted(folder.glob("*.bin")) if _is_llmc(path)]
    if len(found) != 1:
        names = " and ".join(path.name for path in found)
        raise TokenizerError(
            f"The folder {folder} has {names}: which tokenizer is meant?"
            if found
            else f"No tokenizer lies in {folder}.",
            remedy="Name the file." if found else f"Name {_KNOWN}.",
            field="tokenizer",
        )
    return found[0]


def _load_file(path: Path) -> Tokenizer:
    if _is_llmc(path):
        return from_llmc(path)
    if path.name == "tokenizer.pkl":
        raise TokenizerError(f"{path} is nanochat's pickled tokenizer, which is not supported.", field="tokenizer")
    if path.suffix == ".pkl":
        return characters_from_meta(path)
    merges = path.parent / "merges.txt"
    if path.name == "merges.txt" and (path.parent / "vocab.json").is_file():
        return from_vocab_merges(path.parent / "vocab.json", path)
    if path.suffix == ".json":
        text = read_text(path)
        value = parse_object(text, path)
        # By type, not only by name: "characters" and "model" are also words in a vocabulary.
        if isinstance(value.get("characters"), list):
            return from_characters_object(value, str(path))
        if isinstance(value.get("model"), dict):
            return from_tokenizer_object(text, value, path)
        if path.name.endswith("vocab.json") or (value and all(type(token_id) is int for token_id in value.values())):
            if merges.is_file():
                return from_vocab_merges(path, merges)
            raise TokenizerError(f"{path} needs the merges.txt beside it, which is not there.", field="tokenizer")
    raise TokenizerError(f"{path} is not a tokenizer that is known.", remedy=f"Name {_KNOWN}.", field="tokenizer")


def _is_llmc(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == struct.pack("<I", LLMC_MAGIC)
    except OSError:
        return False
