"""A finished answer as it is kept: what the engine said, packed, and read back with distrust.

Kept are token ids, not text: an answer from the cache is made from them exactly as one from the engine. What comes back
from Redis is data from outside, so every part of it is checked; whatever is not an entry of ours is none at all. A sum
over the entry and its key finds what was damaged or lies under another's name; it is no signature.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import msgpack

from nanogpt.engine.messages import Finished, FinishReason, Tokens
from nanogpt.sampling_params import SamplingParams, TokenLogprobs

FORMAT = 1
"""Raise it when the meaning of the stored bytes changes: entries of another format are never looked at."""

_MAX_TOKEN_ID = 2**31
_SUM_BYTES = 16
_REASONS: tuple[FinishReason, ...] = ("stop", "length")


@dataclass(frozen=True)
class Entry:
    """One whole answer. ``reason`` is that of the answer: a stop text has made the engine's ``abort`` a ``stop``."""

    reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def events(self) -> list[Tokens | Finished]:
        """What the engine would say. Its timings are zero: nothing was waited for."""
        tokens: list[Tokens | Finished] = [Tokens(self.token_ids, self.logprobs)] if self.token_ids else []
        return [
            *tokens,
            Finished(
                self.reason,
                self.num_prompt_tokens,
                len(self.token_ids),
                self.num_cached_tokens,
                prompt_logprobs=self.prompt_logprobs,
            ),
        ]

    def pack(self, key: bytes) -> bytes:
        packed: bytes = msgpack.packb(
            [
                FORMAT,
                self.reason,
                self.num_prompt_tokens,
                self.num_cached_tokens,
                self.token_ids,
                None if self.logprobs is None else [_pack_logprobs(item) for item in self.logprobs],
                None
                if self.prompt_logprobs is None
                else [None if item is None else _pack_logprobs(item) for item in self.prompt_logprobs],
            ]
        )
        return _sum(packed, key) + packed


def unpack(data: bytes, key: bytes, num_prompt_tokens: int, params: SamplingParams) -> Entry:
    """The entry that ``pack`` wrote for this request. Raises: ValueError for anything else."""
    packed = data[_SUM_BYTES:]
    _expect(data[:_SUM_BYTES] == _sum(packed, key), "damaged, or under a wrong name")
    try:
        values = msgpack.unpackb(
            packed, strict_map_key=True, max_str_len=16, max_map_len=0, max_bin_len=0, max_ext_len=0
        )
    except Exception as error:  # msgpack has errors of several families
        raise ValueError(f"not msgpack: {type(error).__name__}") from None
    _expect(type(values) is list and len(values) == 7 and values[0] == FORMAT, "not an entry of this format")
    _, reason, num_prompt, num_cached, token_ids, logprobs, prompt_logprobs = values
    _expect(reason in _REASONS, "an unknown reason")
    _expect(num_prompt == num_prompt_tokens and _is_int(num_prompt), "another prompt's length")
    _expect(_is_int(num_cached) and 0 <= num_cached <= num_prompt, "a wrong number of cached tokens")
    _expect(type(token_ids) is list and len(token_ids) <= params.max_tokens, "more tokens than were asked for")
    _expect(all(_is_int(item) and 0 <= item < _MAX_TOKEN_ID for item in token_ids), "a token id that is none")
    _expect((logprobs is None) == (params.logprobs is None), "log probabilities that nobody asked for, or none")
    _expect((prompt_logprobs is None) == (params.prompt_logprobs is None), "the prompt's log probabilities, likewise")
    if logprobs is not None:
        _expect(type(logprobs) is list and len(logprobs) == len(token_ids), "log probabilities of other tokens")
    if prompt_logprobs is not None:
        _expect(type(prompt_logprobs) is list and len(prompt_logprobs) <= num_prompt, "more of them than the prompt's")
    return Entry(
        reason,
        num_prompt,
        num_cached,
        token_ids,
        None if logprobs is None else [_unpack_logprobs(item) for item in logprobs],
        None
        if prompt_logprobs is None
        else [None if item is None else _unpack_logprobs(item) for item in prompt_logprobs],
    )


def size_of(event: Tokens | Finished) -> int:
    """At most so many bytes does the event add to a packed entry."""
    if isinstance(event, Tokens):
        return 5 * len(event.token_ids) + (sum(map(_logprobs_size, event.logprobs)) if event.logprobs else 0)
    return 64 + sum(1 if item is None else _logprobs_size(item) for item in event.prompt_logprobs or ())


def _logprobs_size(item: TokenLogprobs) -> int:
    return 20 + 15 * len(item.top)


def _pack_logprobs(item: TokenLogprobs) -> list[Any]:
    return [item.logprob, item.rank, item.top]


def _unpack_logprobs(item: Any) -> TokenLogprobs:
    _expect(type(item) is list and len(item) == 3 and type(item[2]) is list, "log probabilities of another form")
    logprob, rank, top = item
    _expect(_is_logprob(logprob) and _is_int(rank) and rank >= 1, "a log probability or rank that is none")
    for pair in top:
        _expect(type(pair) is list and len(pair) == 2, "an alternative of another form")
        _expect(
            _is_int(pair[0]) and 0 <= pair[0] < _MAX_TOKEN_ID and _is_logprob(pair[1]), "an alternative that is none"
        )
    return TokenLogprobs(logprob, rank, [(token_id, value) for token_id, value in top])


def _is_int(value: Any) -> bool:
    return type(value) is int  # True is an int to Python


def _is_logprob(value: Any) -> bool:
    return type(value) is float and not math.isnan(value)


def _sum(packed: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=_SUM_BYTES, key=key).digest()


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
