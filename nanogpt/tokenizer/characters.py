"""Character vocabularies: one id a character, as nanoGPT's ``meta.pkl`` has them, or ``characters.json``.

A character outside the vocabulary is the request's fault and says so: which, where, and what the vocabulary has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogpt.errors import TokenizerError, UnknownCharacter
from nanogpt.tokenizer.base import check_text, decode_bytes, describe_character, describe_position
from nanogpt.tokenizer.files import parse_object, read_text

# More characters than Unicode has cannot be in a vocabulary: a larger id is damage, and would be a table of gigabytes.
_MAX_ID = 0x10FFFF
_MAX_LISTED = 40


class CharacterTokenizer:
    """``characters`` in id order; None where an id stands for nothing."""

    name = "characters"
    eos_token_id: int | None = None

    def __init__(self, characters: Sequence[str | None], *, source: str = "the vocabulary") -> None:
        self._ids: dict[str, int] = {}
        for token_id, character in enumerate(characters):
            if character is None:
                continue
            _check_entry(character, token_id, source)
            if self._ids.setdefault(character, token_id) != token_id:
                raise TokenizerError(
                    f"{source} has {describe_character(character)} twice: as id {self._ids[character]} and {token_id}."
                )
        if not self._ids:
            raise TokenizerError(f"{source} has no characters.")
        self.characters = tuple(characters)
        self.num_tokens = len(characters)
        self._bytes = [(character or "").encode("utf-8") for character in characters]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        check_text(text)
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            raise self._unknown(text) from None

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < self.num_tokens else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode_bytes(self.token_bytes, token_ids)

    def to_spec(self) -> dict[str, Any]:
        return {"kind": "characters", "characters": list(self.characters)}

    def _unknown(self, text: str) -> UnknownCharacter:
        index = next(i for i, character in enumerate(text) if character not in self._ids)
        others = list(dict.fromkeys(text))
        others = [character for character in others if character not in self._ids and character != text[index]]
        message = (
            f"The character {describe_character(text[index])} {describe_position(text, index)} is not in this "
            f"model's vocabulary of {len(self._ids)} characters: {_summary(list(self._ids))}."
        )
        if others:
            shown = ", ".join(map(describe_character, others[:5])) + (", …" if len(others) > 5 else "")
            message += f" {len(others)} more of the text's characters are not in it: {shown}."
        return UnknownCharacter(message, remedy="Leave out what the model was not trained on.")


def characters(chars: Sequence[str | None]) -> CharacterTokenizer:
    """A vocabulary of these characters, in id order."""
    return CharacterTokenizer(chars)


def characters_from_meta(path: str | os.PathLike[str]) -> CharacterTokenizer:
    """The vocabulary in nanoGPT's ``meta.pkl``: ``stoi`` (character → id) and ``itos`` (id → character, or a list).

    Nothing in the pickle is executed.

    Raises: UnsafeCheckpoint, CorruptCheckpoint, CheckpointNotFound for the pickle; TokenizerError for what is in it.
    """
    # Late, and against the order of the house: the reader of pickles belongs to the checkpoints above.
    from nanogpt.checkpoint.safe_pickle import load_plain

    meta = load_plain(path)
    source = os.fspath(path)
    if not isinstance(meta, Mapping) or not ("stoi" in meta or "itos" in meta):
        found = ", ".join(map(str, list(meta)[:10])) if isinstance(meta, Mapping) else type(meta).__name__
        raise TokenizerError(
            f"{source} holds no character vocabulary: neither stoi nor itos (found: {found or 'nothing'}).",
            remedy="Name the tokenizer that the model was trained with, for example gpt2.",
        )
    tables = []
    if meta.get("itos") is not None:
        tables.append(_by_id(meta["itos"], "itos", source))
    if meta.get("stoi") is not None:
        stoi = meta["stoi"]
        if not isinstance(stoi, Mapping):
            raise TokenizerError(f"stoi in {source} is a {type(stoi).__name__}; it must be a dict.")
        tables.append(_by_id(_inverse(stoi, source), "stoi", source))
    if len(tables) == 2 and tables[0] != tables[1]:
        token_id = min(i for i in {*tables[0], *tables[1]} if tables[0].get(i) != tables[1].get(i))
        raise TokenizerError(
            f"stoi and itos in {source} disagree: id {token_id} is {tables[1].get(token_id)!r} in stoi "
            f"and {tables[0].get(token_id)!r} in itos."
        )
    table = tables[0]
    return CharacterTokenizer([table.get(i) for i in range(max(table, default=-1) + 1)], source=source)


def from_characters_json(path: str | os.PathLike[str]) -> CharacterTokenizer:
    """The vocabulary in a JSON file ``{"characters": [...]}``, in id order (null: an id that stands for nothing)."""
    source = Path(path)
    return from_characters_object(parse_object(read_text(source), source), str(source))


def from_characters_object(value: Mapping[str, Any], source: str) -> CharacterTokenizer:
    entries = value.get("characters")
    if not isinstance(entries, (list, tuple)):
        raise TokenizerError(f'{source} has no list "characters".')
    return CharacterTokenizer(entries, source=source)


def _by_id(itos: Any, name: str, source: str) -> dict[int, str]:
    if isinstance(itos, (list, tuple)):
        itos = {i: character for i, character in enumerate(itos) if character is not None}
    if not isinstance(itos, Mapping):
        raise TokenizerError(f"{name} in {source} is a {type(itos).__name__}; it must be a dict or a list.")
    for token_id, character in itos.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id <= _MAX_ID:
            raise TokenizerError(f"{name} in {source} has the id {token_id!r}; ids are 0 to {_MAX_ID}.")
        _check_entry(character, token_id, source)
    return dict(itos)


def _inverse(stoi: Mapping[Any, Any], source: str) -> dict[Any, str]:
    inverse: dict[Any, str] = {}
    for character, token_id in stoi.items():
        try:
            first = inverse.setdefault(token_id, character)
        except TypeError:
            raise TokenizerError(f"stoi in {source} has the id {token_id!r}; ids are 0 to {_MAX_ID}.") from None
        if first != character:
            raise TokenizerError(f"stoi in {source} gives the id {token_id!r} to {first!r} and to {character!r}.")
    return inverse


def _check_entry(character: Any, token_id: int, source: str) -> None:
    if not isinstance(character, str) or len(character) != 1:
        shown = repr(character) if len(repr(character)) <= 60 else repr(character)[:60] + "…"
        raise TokenizerError(
            f"{source} is not a character vocabulary: id {token_id} is {shown}, not one character.",
            remedy="A vocabulary of longer pieces needs a tokenizer.json.",
        )
    if "\ud800" <= character <= "\udfff":
        raise TokenizerError(f"{source} has half a surrogate pair as id {token_id} (U+{ord(character):04X}).")


def _summary(known: list[str]) -> str:
    """The characters in order, runs of letters or digits as ranges, the list cut where it gets long."""
    parts = list(_runs(sorted(known)))
    shown = " ".join(text for text, _ in parts[:_MAX_LISTED])
    hidden = sum(count for _, count in parts[_MAX_LISTED:])
    return f"{shown} and {hidden} more" if hidden else shown


def _runs(ordered: list[str]) -> Iterator[tuple[str, int]]:
    start = 0
    for end in range(1, len(ordered) + 1):
        first, last = ordered[start], ordered[end - 1]
        if end < len(ordered) and ord(ordered[end]) == ord(last) + 1 and _kind(ordered[end]) == _kind(first) != "":
            continue
        for character in ordered[start:end] if end - start < 3 else ():
            yield (character if character.isprintable() and not character.isspace() else repr(character)), 1
        if end - start >= 3:
            yield f"{first}-{last}", end - start
        start = end


def _kind(character: str) -> str:
    """Ranges are of characters of one kind; of marks and signs nobody knows by heart what lies between two."""
    if character.isdigit():
        return "digit"
    if character.isupper():
        return "upper"
    return "lower" if character.islower() else "letter" if character.isalpha() else ""
