"""Text to token ids and back: the protocol that every tokenizer keeps, and what all of them share.

For every one of them ``decode(ids)`` is the ``token_bytes`` of the ids, laid end to end and read as UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from nanogpt.errors import InvalidRequest, UnknownCharacter


@runtime_checkable
class Tokenizer(Protocol):
    """Immutable and safe to share between threads.

    ``name`` is shown on the card (``gpt2``, ``characters``, ``tokenizer.json``, ``vocab.json``, ``llm.c``).
    ``num_tokens`` counts the ids it knows, special ones included. ``eos_token_id`` ends a text, or is None.
    """

    name: str
    num_tokens: int
    eos_token_id: int | None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of the text. Special tokens such as ``<|endoftext|>`` are text unless ``allow_special``.

        Raises: UnknownCharacter for a character that the vocabulary lacks, naming it and its position;
        InvalidRequest for half a surrogate pair, which is no text.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the id stands for; they may be a part of a character. Unknown ids give ``b""``."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def to_spec(self) -> dict[str, Any]:
        """All of the tokenizer as plain data that JSON and msgpack carry: ``tokenizer_from_spec`` is the way back."""
        ...


def decode_bytes(token_bytes: Callable[[int], bytes], token_ids: Iterable[int]) -> str:
    return b"".join(map(token_bytes, token_ids)).decode("utf-8", errors="replace")


def check_text(text: str) -> None:
    """Refuse half a surrogate pair: JSON can carry it (``"\\ud800"``) but it has no UTF-8 and no token.

    Raises: InvalidRequest naming it and its position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code, position = f"U+{ord(text[error.start]):04X}", describe_position(text, error.start)
        raise InvalidRequest(
            f"The text has half a surrogate pair ({code}) {position}.",
            remedy="Send the whole character, as UTF-8 or as both of its \\u escapes.",
        ) from None


def describe_position(text: str, index: int) -> str:
    """Where a character stands, as a person finds it: its index from 0, and line and column from 1."""
    line = text.count("\n", 0, index) + 1
    column = index - text.rfind("\n", 0, index)
    return f"at position {index} (line {line}, column {column})"


def describe_character(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def empty_prompt(tokenizer: Tokenizer) -> list[int]:
    """What an empty prompt stands for: a GPT continues at least one token.

    Raises: InvalidRequest where the model has nothing to start from.
    """
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    try:
        return tokenizer.encode("\n")
    except UnknownCharacter:
        raise InvalidRequest(
            "The prompt is empty, and this model has neither an end-of-text token nor a line break to start from.",
            remedy="Begin with a character of the model's vocabulary.",
            field="prompt",
        ) from None
