"""What the tokens of a tokenizer.json stand for, as bytes, by the rules of its ``decoder``.

A token must mean the same wherever it stands, or a text could not be streamed. Decoders for which that is so are
followed exactly; a space that a decoder takes away at the very beginning of a text is kept, because what a model writes
goes on after its prompt. The other decoders are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanogpt.errors import TokenizerError

# What the decoder's part makes of tokens; bytes are as far as it goes.
Step = Callable[[list[str]], "Sequence[str | bytes]"]

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
    ordinary = [token for token in vocabulary if token not in added]
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token in added & vocabulary.keys():
        table[vocabulary[token]] = token.encode("utf-8")
    ids, texts = [vocabulary[token] for token in ordinary], ordinary
    for step in _steps(tokenizer, ordinary, source):
        pieces = step(texts)
        for token_id, piece in zip(ids, pieces, strict=True):
            if isinstance(piece, bytes):
                table[token_id] = piece
        ids = [token_id for token_id, piece in zip(ids, pieces, strict=True) if isinstance(piece, str)]
        texts = [piece for piece in pieces if isinstance(piece, str)]
    for token_id, text in zip(ids, texts, strict=True):
        table[token_id] = text.encode("utf-8")
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
        return _bytes_of_symbols
    if kind == "ByteFallback":
        return lambda tokens: [
            bytes((int(match[1], 16),)) if (match := _BYTE_TOKEN.fullmatch(token)) else token for token in tokens
        ]
    if kind == "Metaspace":
        space: str = part["replacement"]
        return lambda tokens: [token.replace(space, " ") for token in tokens]
    if kind == "Replace" and "String" in part["pattern"]:
        old, new = part["pattern"]["String"], part["content"]
        return lambda tokens: [token.replace(old, new) for token in tokens]
    return None


def _bytes_of_symbols(tokens: list[str]) -> list[str | bytes]:
    """A token with other characters was added to the vocabulary as it is, and stays; so does the decoder itself."""
    symbols = byte_symbols()
    separator = "\uffff"  # no symbol
    others = set().union(*tokens) - symbols.keys()
    if not others:  # all at once: one by one, 50,000 tokens take a tenth of a second
        text = separator.join(tokens).translate({ord(symbol): byte for symbol, byte in symbols.items()})
        return [piece.encode("latin-1") for piece in text.split(separator)] if tokens else []
    return [token if others.intersection(token) else bytes(map(symbols.__getitem__, token)) for token in tokens]
