"""What ``RATE_LIMIT`` may say: ``10 per minute; 100/hour``, the language of Flask-Limiter (the library ``limits``)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanogpt.engine.windows import Rule
from nanogpt.errors import SettingsError

_UNITS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "month": 2_592_000, "year": 31_104_000}
_ONE = re.compile(r"\s*(\d{1,9})\s*(?:/|per)\s*(\d{1,6})?\s*([a-z]+?)s?\s*", re.ASCII | re.IGNORECASE)
_MAX_RULES = 8


def parse_rate_limit(text: str) -> tuple[Rule, ...]:
    """The rules, the shortest period first; none for ``off``. Raises: SettingsError."""
    if text.strip().lower() == "off":
        return ()
    rules: dict[int, Rule] = {}
    parts = re.split("[;,|]", text)
    for part in parts:
        match = _ONE.fullmatch(part)
        unit_s = _UNITS_S.get(match[3].lower()) if match is not None else None
        if match is None or unit_s is None or not int(match[1]) or match[2] == "0" or len(parts) > _MAX_RULES:
            raise SettingsError(
                f"RATE_LIMIT is {text[:80]!r}; it must be off, or a number of requests and a time.",
                field="rate_limit",
                remedy="For example: 10 per minute, or 2/second; 100 per 1 hour (second to year, at most"
                f" {_MAX_RULES} with ; between).",
            )
        period_s = unit_s * int(match[2] or 1)
        rule = Rule("requests", int(match[1]), period_s)
        rules[period_s] = min(rule, rules.get(period_s, rule), key=lambda rule: rule.limit)
    return tuple(rules[period_s] for period_s in sorted(rules))


def describe(rules: Sequence[Rule]) -> str:
    """The rules in words that ``parse_rate_limit`` understands."""
    return "; ".join(f"{rule.limit} per {_period(rule.period_s)}" for rule in rules)


def _period(period_s: int) -> str:
    """60 → minute, 7200 → 2 hours."""
    unit, unit_s = max(
        ((unit, unit_s) for unit, unit_s in _UNITS_S.items() if period_s % unit_s == 0), key=lambda item: item[1]
    )
    count = period_s // unit_s
    return unit if count == 1 else f"{count} {unit}s"
