"""Who makes a request: what limits, the engine's fairness and metrics know of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """``name`` is what is counted by: ``key:NAME`` for a key's owner, ``address:IP`` for everybody else.

    Limits of None do not exist. ``max_concurrency`` counts texts that are generated (or wait) at once.
    """

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
