"""Tokens with their log probabilities, in the three forms that clients know. Pure functions.

A token that is only a part of a character is shown as OpenAI does: ``bytes:\\xe4\\xb8``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanogpt.sampling_params import TokenLogprobs
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.web.generation import TextGeneration


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def plain_logprobs(text: TextGeneration, start: int = 0) -> list[dict[str, Any]]:
    """/generate's own form: id, text, logprob and the most probable tokens, from token ``start`` on."""
    tokenizer = text.tokenizer

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        return {"id": token_id, "text": token_text(tokenizer, token_id), "logprob": logprob}

    return [
        {**shown(token_id, item.logprob), "rank": item.rank, "top": [shown(*pair) for pair in item.top]}
        for token_id, item in zip(text.token_ids[start:], text.logprobs[start:], strict=True)
    ]


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: Sequence[int]
) -> dict[str, list[Any]]:
    """OpenAI's form for completions: four lists that run alongside. None: nothing precedes the token.

    ``top_logprobs`` has the token itself, too, also where it is not among the most probable ones.
    """
    tokens = [token_text(tokenizer, token_id) for token_id in token_ids]
    tops: list[dict[str, float] | None] = []
    for token, item in zip(tokens, logprobs, strict=True):
        top: dict[str, float] | None = None
        if item is not None:
            top = {}
            for token_id, logprob in item.top:
                top.setdefault(token_text(tokenizer, token_id), logprob)
            top.setdefault(token, item.logprob)
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": [None if item is None else item.logprob for item in logprobs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, Any]]:
    """OpenAI's form for chats."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": list(data)}

    return [
        {**shown(token_id, item.logprob), "top_logprobs": [shown(*pair) for pair in item.top]}
        for token_id, item in zip(token_ids, logprobs, strict=True)
    ]
