"""Grammars as HTTP workers make them: what is wrong is said before an engine sees it; and what they may cost."""

from __future__ import annotations

from typing import Any

import pytest

from nanogpt import grammars
from nanogpt.errors import InvalidRequest
from nanogpt.sampling_params import SamplingParams

NESTED: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}}}}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "string", "pattern": "^[a-z]+/[0-9]{2}$"},
        {"enum": ["yes", "no", 'a "quote"', "日本"]},
        NESTED | {"$defs": {"b": {"anyOf": [{"type": "integer", "minimum": 3}, {"const": None}]}}},
        {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    ],
)
def test_a_schema_becomes_a_grammar(schema: dict[str, Any]) -> None:
    SamplingParams(grammar=grammars.from_json_schema(schema))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"not": {}}, r'Unimplemented keys: \["not"\]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "https://example.com/schema"}, "does not fetch"),
        (NESTED, "does not exist"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "format": "nonsense"}, "Unknown format: nonsense"),
        ({"const": float("nan")}, "not JSON"),
        ({"const": {1, 2}}, "not JSON"),
        ({"const": "\ud800"}, "not JSON"),
        ({"enum": ["x" * 20_000]}, "20014 bytes; at most 16384"),
        ({"properties": {f"k{i}": {"items": {}} for i in range(600)}}, "too big"),
        ("object", "an object, not str"),
        (True, "an object, not bool"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_by_name(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^response_format: .*{reason}") as refused:
        grammars.from_json_schema(schema)
    assert refused.value.field == "response_format"
    assert len(refused.value.message) < 500
    assert "\n" not in refused.value.message


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(400):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="recursion"):
        grammars.from_json_schema(schema)


@pytest.mark.parametrize("pattern", ["a+", "^a|b$", r"\d{4}-\d{2}", "a/b\nc", "日本語+", "(?i)yes|no"])
def test_a_regular_expression_becomes_a_grammar(pattern: str) -> None:
    SamplingParams(grammar=grammars.from_regex(pattern))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "unclosed group"),
        (r"(a)\1", "backreferences are not supported"),
        ("(?=a)b", "look-around"),
        ("", "not empty"),
        (7, "not empty"),
        ("a\ud800", "surrogate"),
        ("é" * 10_000, "20000 bytes; at most 16384"),
    ],
)
def test_a_regular_expression_that_cannot_be_followed_is_refused(pattern: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^regex: .*{reason}") as refused:
        grammars.from_regex(pattern, field="regex")
    assert refused.value.field == "regex"
    assert "start:" not in refused.value.message, "what llguidance makes of it is not the user's text"


@pytest.mark.parametrize("grammar", ["", 3, b"a"])
def test_a_grammar_that_is_no_text_is_refused(grammar: Any) -> None:
    with pytest.raises(InvalidRequest, match="grammar must be"):
        SamplingParams(grammar=grammar)
