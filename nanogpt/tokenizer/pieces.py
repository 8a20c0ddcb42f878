"""What the tokens of a tokenizer.json stand for, as bytes, by the rules of its ``decoder``.

A token must mean the same wherever it stands, or a text could not be streamed. Decoders for which that is so are
followed exactly; a space that a decoder takes away at the very beginning of a text is kept, because what a model writes
goes on after its prompt. The other decoders are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nanogpt.errors import TokenizerError

Step = Callable[[str], "str | bytes"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTEXTUAL = {
    "WordPiece": "it joins words by rules that look at the whole text",
    "BPEDecoder": "it puts no space after the last word of a text, so a text cannot be continued",
    "CTC": "it is made for speech",
}


def byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes. Source: bytes_to_unicode of openai/gpt-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_table(tokenizer: Mapping[str, Any], vocabulary: Mapping[str, int], source: str) -> list[bytes]:
    """The bytes of every id, ``b""`` for ids that stand for nothing. ``tokenizer`` is the parsed tokenizer.json.

    Raises: TokenizerError where the decoder is not one of those that stream.
    """
    added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    steps = _steps(tokenizer, [token for token in vocabulary if token not in added], source)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        piece: str | bytes = token
        for step in () if token in added else steps:
            if isinstance(piece, bytes):
                break
            piece = step(piece)
        table[token_id] = piece.encode("utf-8") if isinstance(piece, str) else piece
    return table


def _steps(tokenizer: Mapping[str, Any], ordinary: list[str], source: str) -> list[Step]:
    decoder = tokenizer.get("decoder")
    if decoder is None:
        # Without a decoder the pieces are words to be joined by spaces, or, where each is one character, a text.
        if all(len(token) == 1 for token in ordinary):
            return []
        raise TokenizerError(
            f"{source} has no decoder: its tokens cannot be put together to a text again.",
            remedy="Set the tokenizer's decoder and save it again.",
        )
    steps: list[Step] = []
    fused = False
    for part in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        kind = part["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and not part.get("stop"):
            pass  # the beginning of the text alone: kept, see above
        elif fused or (step := _step(kind, part)) is None:
            reason = _CONTEXTUAL.get(kind, "here, what a token means would depend on its neighbours")
            raise TokenizerError(
                f"{source} has the decoder {kind}, which cannot be streamed: {reason}.",
                remedy="Decoders that can: ByteLevel, Metaspace, ByteFallback, Fuse, Replace (of a text).",
            )
        else:
            steps.append(step)
    return steps


def _step(kind: str, part: Mapping[str, Any]) -> Step | None:
    if kind == "ByteLevel":
        symbols = byte_symbols()
        # A token with other characters was added to the vocabulary as it is; so does the decoder itself.
        return lambda token: bytes(map(symbols.__getitem__, token)) if symbols.keys() >= set(token) else token
    if kind == "ByteFallback":
        return lambda token: bytes((int(match[1], 16),)) if (match := _BYTE_TOKEN.fullmatch(token)) else token
    if kind == "Metaspace":
        space: str = part["replacement"]
        return lambda token: token.replace(space, " ")
    if kind == "Replace" and "String" in part["pattern"]:
        old, new = part["pattern"]["String"], part["content"]
        return lambda token: token.replace(old, new)
    return None
