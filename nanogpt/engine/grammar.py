"""Grammars over a model's vocabulary: which tokens may come next in a text that follows one. In the engine's loop.

``Grammars`` holds the vocabulary in llguidance's form, made from the checkpoint's tokenizer when the first grammar
comes (a few tenths of a second and 20 MB for GPT-2's), and the grammars that were compiled last: n answers to one
request compile it once. ``GrammarState`` is one sequence's place in its grammar. What matching may cost is bounded by
``nanogpt.grammars.limits``; a grammar that costs more ends its own sequence.

The end of a text is not part of it: ids that end the output (the end of text, ``stop_token_ids``) may be drawn where
the grammar may end, and a text that can only end does so by itself. So a model without an end-of-text token follows
grammars, too, but it ends only where nothing can follow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from nanogpt import grammars
from nanogpt.errors import InvalidRequest, UnknownCharacter
from nanogpt.runner.base import UInt32
from nanogpt.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# What nanogpt.grammars makes is shorter. A regular expression's escapes are doubled in JSON.
_MAX_BYTES = 4 * grammars.MAX_GRAMMAR_BYTES
_NUM_COMPILED = 32
_MAX_FORCED = 256


class Grammars:
    """Grammars over one tokenizer's tokens, ids ``[0, num_tokens)``: the model may know fewer than the tokenizer."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], num_tokens: int) -> None:
        self._load_tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._vocabulary: tuple[LLTokenizer, int] | None = None
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()

    def start(self, grammar: str, stop_ids: Iterable[int]) -> GrammarState:
        """The state before the first token. ``stop_ids`` end the text.

        Raises: InvalidRequest when the grammar is none, or this vocabulary cannot even begin a text of it.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._compile(grammar)
            if len(self._compiled) > _NUM_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return GrammarState(compiled, [i for i in stop_ids if 0 <= i < self._num_tokens])

    def _compile(self, grammar: str) -> _Compiled:
        from llguidance import LLMatcher

        if len(grammar.encode("utf-8", errors="replace")) > _MAX_BYTES:
            raise InvalidRequest(f"The grammar is longer than {_MAX_BYTES} bytes.", field="grammar")
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._load_tokenizer(), self._num_tokens)
        vocabulary, end_id = self._vocabulary
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=grammars.limits())
        if matcher.is_error():
            error = grammars.reason(matcher.get_error())
            raise InvalidRequest(f"The grammar cannot be followed: {error}", field="grammar")
        compiled = _Compiled(matcher, end_id, (self._num_tokens + 31) // 32)
        if _text_mask(compiled, matcher) is None:
            raise InvalidRequest("The grammar allows no text but the empty one.", field="grammar")
        return compiled


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A grammar before its first token: never advanced, only copied. ``end_id`` is llguidance's end of text."""

    matcher: LLMatcher
    end_id: int
    num_words: int


class GrammarState:
    """How far one sequence is in its grammar.

    A mask is as ``SamplingState`` has it. None instead of one: the text is complete, and nothing can follow it.
    """

    def __init__(self, compiled: _Compiled, stop_ids: list[int]) -> None:
        self._compiled = compiled
        self._matcher = compiled.matcher
        self._stop_mask = np.zeros(compiled.num_words, np.uint32)
        for token_id in stop_ids:
            self._stop_mask[token_id // 32] |= np.uint32(1 << token_id % 32)

    def first_mask(self) -> UInt32 | None:
        """What the output may begin with."""
        self._matcher = self._compiled.matcher.deep_copy()
        return self._mask()

    def advance(self, token_ids: Iterable[int]) -> UInt32 | None:
        """What may follow after these.

        Raises: InvalidRequest when they do not fit, nothing of this vocabulary does, or matching costs too much.
        """
        for token_id in token_ids:
            if not self._matcher.consume_token(token_id):
                raise _error(self._matcher, f"token {token_id} does not fit")
        return self._mask()

    def _mask(self) -> UInt32 | None:
        mask = _text_mask(self._compiled, self._matcher)
        if mask is not None and self._matcher.is_accepting():
            mask |= self._stop_mask
        return mask


def _text_mask(compiled: _Compiled, matcher: LLMatcher) -> UInt32 | None:
    """The tokens that go on with the text; None when there are none and it may end. Raises: InvalidRequest."""
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: compiled.num_words].copy()
    if compiled.end_id // 32 < len(mask):
        mask[compiled.end_id // 32] &= ~np.uint32(1 << compiled.end_id % 32)
    if mask.any():
        return mask
    if matcher.is_accepting():
        return None
    raise _error(matcher, "no token of this model's vocabulary goes on with the text")


def _error(matcher: LLMatcher, otherwise: str) -> InvalidRequest:
    # A dead end is no error of the matcher's, but it stops there with this reason.
    error = "" if matcher.stop_reason() == "NoExtensionBias" else grammars.reason(matcher.get_error())
    return InvalidRequest(f"The grammar cannot be followed: {error or otherwise}", field="grammar")


class _Tokens:
    """A tokenizer as llguidance takes one in. Called with text that the grammar forces, to make tokens of it as the
    model knows them; what cannot be encoded is left out, and is a dead end then.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(num_tokens)]
        eos = tokenizer.eos_token_id
        if eos is None or eos >= num_tokens:
            # A token of no text: llguidance needs an end, and it is never drawn.
            eos = num_tokens
            self.tokens.append(b"")
        self.eos_token_id = eos
        self.tokens[eos] = b"<|end|>"
        self.special_token_ids = [eos]

    def __call__(self, text: str) -> list[int]:
        # A mask needs the first token only; a forced text may be long.
        text = text[:_MAX_FORCED]
        try:
            ids = self._tokenizer.encode(text)
        except UnknownCharacter:
            ids = self._tokenizer.encode("".join(takewhile(self._knows, text)))
        except InvalidRequest:
            ids = []
        return list(takewhile(lambda token_id: token_id < self._num_tokens, ids))

    def _knows(self, character: str) -> bool:
        try:
            return bool(self._tokenizer.encode(character))
        except UnknownCharacter:
            return False


def _vocabulary(tokenizer: Tokenizer, num_tokens: int) -> tuple[LLTokenizer, int]:
    """The tokenizer in llguidance's form, and its end of text."""
    from llguidance import LLTokenizer

    tokens = _Tokens(tokenizer, num_tokens)
    return LLTokenizer(tokens), tokens.eos_token_id  # type: ignore[arg-type]  # what counts is its attributes
