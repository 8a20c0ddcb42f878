"""Text to token ids and back: the protocol that every tokenizer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Immutable and safe to share between threads.

    ``name`` is shown on the card (``gpt2``, ``characters``, ``tokenizer.json``, ``llm.c``).
    ``num_tokens`` counts the ids it knows, special ones included. ``eos_token_id`` ends a text, or is None.
    """

    name: str
    num_tokens: int
    eos_token_id: int | None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of the text. Special tokens such as ``<|endoftext|>`` are text unless ``allow_special``.

        Raises: UnknownCharacter for a character that a character vocabulary lacks, naming it and its position.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the id stands for; they may be a part of a character. Unknown ids give ``b""``."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...
