"""A client's limits: requests, counted before anything else is done for them, and a key's tokens a minute.

One ``Limiter`` a worker process, shared by its threads. Who counts: Redis where ``REDIS_URL`` is set, so that all hosts
share one account; else, and as long as Redis does not answer, this host's ledger (``nanogpt.engine.ledger``), which is
exact over its workers. What a client has used on the one is not known to the other.

Tokens are taken in full before a text begins (the prompt's, and as many as the answer may have), held while it is
written, and settled at its end with what it came to. Knows no routes but their names.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress

from nanogpt.engine.launch import run_dir_of
from nanogpt.engine.ledger import LedgerClient
from nanogpt.engine.windows import Counters, Rule, State, Taken
from nanogpt.errors import InvalidRequest, ServiceUnavailable, TokensLimited, TooManyRequests
from nanogpt.settings import Settings
from nanogpt.web.caller import Caller
from nanogpt.web.engine import EngineHandle
from nanogpt.web.metrics import metrics
from nanogpt.web.rate_limit import describe, parse_rate_limit
from nanogpt.web.redis_link import Breaker
from nanogpt.web.redis_windows import MAX_CONNECTIONS, RedisUnavailable, RedisWindows

log = logging.getLogger(__name__)

GENERATING_ROUTES = frozenset({"/generate", "/v1/completions", "/v1/chat/completions"})
"""The routes that cost: each request to one of them is counted."""

# What a text may need past its own deadline to come to an end.
_HOLD_GRACE_S = 30.0
_NOTHING: Callable[[int], None] = lambda used: None  # noqa: E731


class Limiter:
    """Counts, and refuses. ``redis_ok`` tells how Redis does; its failures are counted by ``metrics``."""

    def __init__(self, settings: Settings, engine: EngineHandle, counters: Counters | None = None) -> None:
        """``counters`` stand for the host's ledger where there is none. Raises: SettingsError, MissingDependency."""
        self._rules = parse_rate_limit(settings.rate_limit)
        self._hold_s = settings.request_timeout_s + _HOLD_GRACE_S
        self._host = LedgerClient(lambda: run_dir_of(settings)[0], engine.state) if counters is None else counters
        self._redis = RedisWindows(settings.redis_url) if settings.redis_url else None
        self._redis_places = threading.Semaphore(MAX_CONNECTIONS)
        self._breaker = Breaker(
            "Redis does not count; this host counts for itself until it is back", "Redis counts again."
        )

    @property
    def redis_ok(self) -> bool | None:
        """Whether Redis counts, as far as is known; None where there is none."""
        return self._breaker.closed if self._redis else None

    def admit(self, caller: Caller) -> dict[str, str]:
        """Count one request of the caller's. Returns the headers that tell it how it stands.

        Raises: TooManyRequests (with them); ServiceUnavailable when it cannot be counted.
        """
        rules = self._rules
        if caller.requests_per_minute is not None:
            rules = (Rule("requests", caller.requests_per_minute, 60),)
        if not rules:
            return {}
        taken, _ = self._take(caller.name, rules, 1)
        headers = _headers(rules, taken.states)
        if not taken.admitted:
            metrics.refused("requests")
            rule, state = _refusing(rules, taken)
            refusal = TooManyRequests(
                f"Too many requests: {describe([rule])} are admitted.",
                remedy=f"Send it again in {_seconds(state.retry_after_s)} s.",
                retry_after_s=state.retry_after_s,
            )
            refusal.headers = headers
            raise refusal
        return headers

    def reserve(self, caller: Caller, num_tokens: int) -> tuple[Callable[[int], None], dict[str, str]]:
        """Hold tokens of the caller's minute. Returns what is called, once, with the number that was used in the end.

        Raises: TokensLimited; InvalidRequest for more than the key ever has; ServiceUnavailable.
        """
        if caller.tokens_per_minute is None:
            return _NOTHING, {}
        rules = (Rule("tokens", caller.tokens_per_minute, 60),)
        if num_tokens > caller.tokens_per_minute:
            raise InvalidRequest(
                f"The request is for up to {num_tokens} tokens, prompt and answer; this key has"
                f" {caller.tokens_per_minute} a minute.",
                remedy="Shorten the prompt, or ask for fewer new tokens.",
            )
        hold = uuid.uuid4().hex
        taken, counters = self._take(caller.name, rules, num_tokens, hold=hold, hold_s=self._hold_s)
        state = taken.states[0]
        headers = {
            "X-RateLimit-Limit-Tokens": str(caller.tokens_per_minute),
            "X-RateLimit-Remaining-Tokens": str(state.remaining),
        }
        if not taken.admitted:
            metrics.refused("tokens")
            refusal = TokensLimited(
                f"Too many tokens: this key has {caller.tokens_per_minute} a minute, {state.remaining} are left, and"
                f" the request is for up to {num_tokens}, prompt and answer.",
                remedy=f"Send it again in {_seconds(state.retry_after_s)} s, or ask for fewer.",
                retry_after_s=state.retry_after_s,
            )
            refusal.headers = headers
            raise refusal

        def settle(used: int) -> None:
            with suppress(ServiceUnavailable):  # it lapses by itself
                counters.settle(caller.name, rules, hold, used)

        return settle, headers

    def _take(
        self, client: str, rules: Sequence[Rule], amount: int, *, hold: str = "", hold_s: float = 0.0
    ) -> tuple[Taken, Counters]:
        """By Redis if it answers, else by this host; and which of them it was."""
        if self._redis is not None:
            with self._redis_places:  # whoever had to wait here knows what happened to those before
                taken = self._take_from_redis(self._redis, client, rules, amount, hold, hold_s)
            if taken is not None:
                return taken, self._redis
        return self._host.take(client, rules, amount, hold=hold, hold_s=hold_s), self._host

    def _take_from_redis(
        self, redis: RedisWindows, client: str, rules: Sequence[Rule], amount: int, hold: str, hold_s: float
    ) -> Taken | None:
        if not self._breaker.admits():
            return None
        since = time.monotonic()
        try:
            taken = redis.take(client, rules, amount, hold=hold, hold_s=hold_s)
        except RedisUnavailable as error:
            self._breaker.failed(str(error))
            return None
        self._breaker.succeeded(since)
        return taken


def _headers(rules: Sequence[Rule], states: Sequence[State]) -> dict[str, str]:
    """RateLimit-* as the IETF's draft-ietf-httpapi-ratelimit-headers had them up to its version 07: of the rule that is
    the nearest to its end, and all of them in RateLimit-Policy."""
    rule, state = min(zip(rules, states, strict=True), key=lambda item: (item[1].remaining, -item[1].reset_s))
    return {
        "RateLimit-Limit": str(rule.limit),
        "RateLimit-Remaining": str(state.remaining),
        "RateLimit-Reset": str(_seconds(state.reset_s)),
        "RateLimit-Policy": ", ".join(f"{rule.limit};w={rule.period_s}" for rule in rules),
    }


def _refusing(rules: Sequence[Rule], taken: Taken) -> tuple[Rule, State]:
    """The rule that refuses for the longest."""
    return max(zip(rules, taken.states, strict=True), key=lambda item: item[1].retry_after_s)


def _seconds(seconds: float) -> int:
    return max(1, math.ceil(seconds))
