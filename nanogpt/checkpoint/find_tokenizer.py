"""Which tokenizer a checkpoint was trained with: read from the files around it, or said to be assumed.

No family but Hugging Face's keeps its tokenizer with the weights. What is chosen without having been read becomes a
note on the card, and the ``tokenizer`` setting overrides all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from nanogpt.checkpoint.locate import follow
from nanogpt.errors import TokenizerError

if TYPE_CHECKING:
    from nanogpt.tokenizer.base import Tokenizer

# GPT-2's own vocabulary, and as the nano projects pad it.
GPT2_VOCABULARIES: Final = (50257, 50304)


def for_family(
    family: str, path: Path, vocab_size: int, dataset: str | None, setting: str
) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer, and notes on how it was found. ``path`` is the model's file, or its Hugging Face folder.

    Raises: TokenizerError naming what was looked for and what to do.
    """
    from nanogpt import tokenizer as tokenizers

    if setting:
        return tokenizers.load_tokenizer(setting), ()
    if family == "nanogpt":
        meta = _meta(path, dataset)
        if meta is not None:
            return tokenizers.characters_from_meta(meta), (f"Tokenizer: characters of {meta}.",)
    elif family == "llm.c":
        beside = path.parent / "gpt2_tokenizer.bin"
        if beside.is_file():
            return tokenizers.from_llmc(follow(beside)), ()
    elif family == "huggingface":
        found = _in_folder(path)
        if found is not None:
            return found, ()
    if vocab_size in GPT2_VOCABULARIES:
        return tokenizers.gpt2(), (f"Tokenizer: gpt2, assumed from the vocabulary of {vocab_size:,}.",)
    raise TokenizerError(
        f"Nothing says which tokenizer {path} was trained with (its vocabulary has {vocab_size:,} entries).",
        remedy={
            "nanogpt": "Put the dataset's meta.pkl beside the checkpoint, or set NANOGPT_TOKENIZER to its path.",
            "huggingface": "Put tokenizer.json, or vocab.json and merges.txt, into its folder, or set"
            " NANOGPT_TOKENIZER to the path of one.",
        }.get(family, "Set NANOGPT_TOKENIZER to gpt2 or to the path of a tokenizer."),
    )


def _meta(path: Path, dataset: str | None) -> Path | None:
    """nanoGPT's meta.pkl: beside the checkpoint, or data/<dataset>/ below its folder, a parent, or the current one."""
    folder = path.resolve().parent
    places = [folder / "meta.pkl"]
    if dataset:
        roots = (folder, *folder.parents, Path.cwd())
        places += [root / "data" / dataset / "meta.pkl" for root in roots]
    return next((follow(place) for place in places if place.is_file()), None)


def _in_folder(folder: Path) -> Tokenizer | None:
    from nanogpt import tokenizer as tokenizers

    names = ("characters.json", "tokenizer.json", "vocab.json", "merges.txt")
    files = {name: follow(folder / name) for name in names if (folder / name).is_file()}
    if "characters.json" in files:
        return tokenizers.from_characters_json(files["characters.json"])
    if "tokenizer.json" in files:
        return tokenizers.from_tokenizer_json(files["tokenizer.json"])
    if "vocab.json" in files and "merges.txt" in files:
        return tokenizers.from_vocab_merges(files["vocab.json"], files["merges.txt"])
    return None
