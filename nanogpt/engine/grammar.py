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
from typing import TYPE_CHECKING

import numpy as np

from nanogpt import grammars
from nanogpt.errors import InvalidRequest
from nanogpt.runner.base import UInt32
from nanogpt.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# What nanogpt.grammars makes is shorter. A regular expression's escapes are doubled in JSON.
_MAX_BYTES = 4 * grammars.MAX_GRAMMAR_BYTES
_NUM_COMPILED = 32
_MAX_FORCED = 1024


class Grammars:
    """Grammars over one tokenizer's tokens, ids ``[0, num_tokens)``: the model may know fewer than the tokenizer."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], num_tokens: int) -> None:
        self._load_tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._vocabulary: tuple[LLTokenizer, _Tokens] | None = None
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
        from llguidance import LLMatcher, LLTokenizer

        if len(grammar.encode("utf-8", errors="replace")) > _MAX_BYTES:
            raise InvalidRequest(f"The grammar is longer than {_MAX_BYTES} bytes.", field="grammar")
        if self._vocabulary is None:
            tokens = _Tokens(self._load_tokenizer(), self._num_tokens)
            self._vocabulary = LLTokenizer(tokens), tokens  # type: ignore[arg-type]  # its attributes are what counts
        vocabulary, tokens = self._vocabulary
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=grammars.limits())
        if matcher.is_error():
            error = grammars.reason(matcher.get_error())
            raise InvalidRequest(f"The grammar cannot be followed: {error}", field="grammar")
        compiled = _Compiled(matcher, tokens, (self._num_tokens + 31) // 32)
        if _text_mask(compiled, matcher) is None:
            raise InvalidRequest("The grammar allows no text but the empty one.", field="grammar")
        return compiled


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A grammar before its first token: never advanced, only copied."""

    matcher: LLMatcher
    tokens: _Tokens
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
    tokens = compiled.tokens
    # Forced text that the vocabulary cannot write, llguidance takes as written.
    forced = matcher.compute_ff_bytes()
    if forced and not tokens.can_begin(forced):
        raise _error(matcher, "no token of this model's vocabulary goes on with the text")
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: compiled.num_words].copy()
    if tokens.eos_token_id // 32 < len(mask):
        mask[tokens.eos_token_id // 32] &= ~np.uint32(1 << tokens.eos_token_id % 32)
    if mask.any():
        return mask
    if matcher.is_accepting():
        return None
    raise _error(matcher, "no token of this model's vocabulary goes on with the text")


def _error(matcher: LLMatcher, otherwise: str) -> InvalidRequest:
    error = matcher.get_error()
    # A dead end is no error, but the matcher calls it one.
    known = "" if error.startswith("NoExtension") else grammars.reason(error)
    return InvalidRequest(f"The grammar cannot be followed: {known or otherwise}", field="grammar")


class _Tokens:
    """A tokenizer as llguidance takes one in. Called with text that the grammar forces, to make tokens of it as the
    model knows them.
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
        self._id_of = {token: i for i, token in enumerate(self.tokens) if token and i != eos}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: str) -> list[int]:
        # A mask needs the next token only; a forced text may be long.
        text = text[:_MAX_FORCED]
        try:
            ids = self._tokenizer.encode(text)
        except InvalidRequest:
            ids = []
        if ids and max(ids) < self._num_tokens:
            return ids
        return self._longest_first(text.encode("utf-8"))

    def can_begin(self, forced: bytes) -> bool:
        """Whether any token begins this text, or goes beyond it."""
        sizes = range(1, min(self._longest, len(forced)) + 1)
        return any(forced[:n] in self._id_of for n in sizes) or any(token.startswith(forced) for token in self._id_of)

    def _longest_first(self, text: bytes) -> list[int]:
        """As much of a text as this vocabulary can write, which its tokenizer cannot encode as a whole."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((n for n in sizes if text[at : at + n] in self._id_of), 0)
            if not size:
                break
            ids.append(self._id_of[text[at : at + size]])
            at += size
        return ids
