"""RATE_LIMIT means what Flask-Limiter's library means by the same words, and what it would not take is refused."""

from __future__ import annotations

import pytest

from nanogpt.engine.windows import Rule
from nanogpt.errors import SettingsError
from nanogpt.web.rate_limit import describe, parse_rate_limit


def test_off() -> None:
    assert parse_rate_limit("off") == parse_rate_limit(" OFF ") == ()


@pytest.mark.parametrize(
    "text",
    [
        "10 per minute",
        "10/minute",
        "10 per 1 minute",
        "100/hour",
        "1 / second",
        "2/second;5 per minute",
        "5 PER 2 Hours, 7 per day | 100 per month",
        "10per1minute",
        "3/year",
        "10 per minutes",
    ],
)
def test_it_is_the_language_of_limits(text: str) -> None:
    limits = pytest.importorskip("limits")
    meant = sorted((item.get_expiry(), item.amount) for item in limits.parse_many(text))
    rules = parse_rate_limit(text)
    assert [(rule.period_s, rule.limit) for rule in rules] == meant
    assert parse_rate_limit(describe(rules)) == rules


def test_of_two_limits_for_one_period_the_smaller_one_counts() -> None:
    assert parse_rate_limit("10 per minute; 5 per 60 seconds") == (Rule("requests", 5, 60),)


@pytest.mark.parametrize(
    "text",
    ["", " ", "10", "ten per minute", "10 per fortnight", "0 per minute", "10 per 0 minutes", "-1 per minute", "on",
     "10 per minute;", ";10 per minute", "1.5 per second", "10 minute", "1/second" + ";1/second" * 8, "９ per minute",
     "10000000000 per second"],
)  # fmt: skip
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"RATE_LIMIT is .*10 per minute"):
        parse_rate_limit(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10/60 seconds", "10 per minute"),
        ("7 per 120 minutes", "7 per 2 hours"),
        ("1/second;9/day", "1 per second; 9 per day"),
    ],
)
def test_it_is_said_in_plain_words(text: str, words: str) -> None:
    assert describe(parse_rate_limit(text)) == words
