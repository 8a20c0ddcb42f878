"""What the server says of itself when it is up: what it serves, where, to whom, and a line to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanogpt.engine.client import EngineStatus
from nanogpt.settings import Settings
from nanogpt.web.rate_limit import describe, parse_rate_limit


def greeting(settings: Settings, states: Sequence[EngineStatus], urls: list[str]) -> Iterator[str]:
    """A few lines for the log. ``states``: how the engines are, the default model's first."""
    url = urls[0]
    if states[0].card is None:
        yield f"Loading {settings.model_checkpoint or 'the embedded model'}; {url}/ready says when it is served."
    else:
        yield f"Serving {_model(states[0], states[0].card)}."
    for other in states[1:]:
        what = settings.compare_checkpoint if other.card is None else _model(other, other.card)
        yield f'To compare with, for requests with "model": "compare": {what}.'
    is_closed = bool(settings.api_key or settings.keys_file)
    to_whom = "to those who have the API key" if is_closed else "to everybody who reaches it (API_KEY is not set)"
    yield f"Open at {' and '.join(urls)} {to_whom}."
    if url.startswith("http"):
        key = " -H 'X-API-Key: …'" if is_closed else ""
        body = '{"prompt": "Once upon a time", "max_length": 100}'
        url = url.replace("//0.0.0.0:", "//localhost:").replace("//[::]:", "//localhost:")
        yield f"Try: curl {url}/generate -H 'Content-Type: application/json'{key} -d '{body}'"
    rules = parse_rate_limit(settings.rate_limit)
    if rules:
        where = "over all hosts with this Redis" if settings.redis_url else "on this host"
        yield f"Rate limit: {describe(rules)} for each client on the generating routes, counted {where}."
    else:
        yield "Rate limit: none (RATE_LIMIT is off)."


def _model(status: EngineStatus, card: Mapping[str, Any]) -> str:
    what = f"{card['family']}, {_count(card['parameters'])} parameters, context {card['block_size']}"
    how = f"{status.device}, {status.runner} runner, {card.get('arithmetic', status.precision)}"
    return f"{status.model} ({what}, tokenizer {card['tokenizer']}) on {how}"


def _count(number: int) -> str:
    """124439808 → 124.4M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
