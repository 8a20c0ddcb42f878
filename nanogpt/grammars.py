"""Grammars that an output follows: from a JSON schema, a regular expression, or any JSON object, to the text that
``SamplingParams.grammar`` carries.

Pure functions, for whoever takes in requests. A grammar is somebody else's: its size is bounded, what it may cost is
bounded (``limits``), and what is wrong with it is said here, before the engine sees it. Whether a model's vocabulary
can write such a text, only the engine knows (``nanogpt.engine.grammar``). llguidance is imported late.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from nanogpt.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_GRAMMAR_BYTES = 16 * 1024
"""Of a schema or a pattern. What a matcher costs grows with it, and a nano GPT's context holds no longer texts."""

_MAX_REASON = 300
# White space between the parts of a JSON text: one blank, or a line break and an indentation. A small model is fond of
# line breaks; without a bound it fills its whole context with them.
_WHITESPACE = r"( |\n {0,8})"


def from_json_schema(schema: dict[str, Any], *, field: str = "response_format") -> str:
    """The grammar of the JSON texts that fit a schema. ``field`` is the request's field, for the error.

    Raises: InvalidRequest when it is not a schema, asks for what cannot be followed, or is too large.
    """
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{field}: a JSON schema is an object, not {type(schema).__name__}.", field=field)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: the schema is not JSON: {error}.", field=field) from None
    _check_size(text, "schema", field)
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
    except ValueError as error:
        _refuse("JSON schema", str(error), field)
    return _validated(grammar, "JSON schema", field)


def from_regex(pattern: str, *, field: str = "response_format") -> str:
    """The grammar of the texts that a regular expression matches from their first character to their last.

    The syntax is that of Rust's ``regex``: no look-around, no back references.

    Raises: InvalidRequest when it is none, or too large.
    """
    if not isinstance(pattern, str) or not pattern:
        raise InvalidRequest(f"{field}: a regular expression is a text that is not empty.", field=field)
    if any("\ud800" <= character <= "\udfff" for character in pattern):
        raise InvalidRequest(f"{field}: the regular expression has half a surrogate pair.", field=field)
    _check_size(pattern, "regular expression", field)
    from llguidance import LLMatcher

    return _validated(LLMatcher.grammar_from_regex(pattern), "regular expression", field)


def any_json_object() -> str:
    """The grammar of any JSON object."""
    return from_json_schema({"type": "object"})


def limits() -> LLParserLimits:
    """What a grammar may cost, here and in the engine: a mask takes some 0.1 ms, and a few hundred at the very worst.

    Errors are short: they must not carry the text that was generated.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=1_000,
        initial_lexer_fuel=300_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=10_000,
        max_grammar_size=10_000,
        verbose_errors=False,
    )


def reason(message: str) -> str:
    """What an llguidance error says, as one short line: without places in its own form of the grammar."""
    text = re.sub(r"^at \d+\(\d+\): ", "", message.partition("<non-verbose/>")[0])
    line = " ".join(re.split(r"\n *\d+ \| ", text)[0].split())
    return line if len(line) <= _MAX_REASON else line[:_MAX_REASON] + "…"


def _check_size(text: str, what: str, field: str) -> None:
    size = len(text.encode("utf-8"))
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"{field}: the {what} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are taken.",
            remedy="Leave out what the answer does not need.",
            field=field,
        )


def _validated(grammar: str, what: str, field: str) -> str:
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if is_error:
        _refuse(what, messages[0], field)
    return grammar


def _refuse(what: str, message: str, field: str) -> NoReturn:
    raise InvalidRequest(f"{field}: this {what} cannot be followed: {reason(message)}", field=field)
