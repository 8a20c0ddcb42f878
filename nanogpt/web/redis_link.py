"""This process's way to Redis, for what may be lost: every call returns in a bounded time and none of them raises.

Used by all threads. A Redis that is gone, slow or full is left alone for a while (a breaker), then one request tries
again; the log has one line for each change. redis-py is imported when a URL is set (extra ``redis``). The URL may hold
a password: it is neither logged nor part of an error.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from nanogpt.errors import MissingDependency, SettingsError
from nanogpt.web.metrics import metrics

log = logging.getLogger(__name__)

TIMEOUT_S = 0.1
"""For a connection, and for each answer on it. A cache that takes longer is slower than many a generation."""
COOLDOWN_S = 2.0
"""How long Redis is left alone after a failure, before one request tries again."""
_MAX_CONNECTIONS = 32
_FORM = "It has the form redis://[[user]:password@]host[:port][/number], or rediss:// for TLS, or unix://path."


class Breaker:
    """After a failure it admits nobody for a while, and then one now and then until one succeeds."""

    def __init__(self, broken: str, mended: str, cooldown_s: float = COOLDOWN_S) -> None:
        self._broken, self._mended, self._cooldown_s = broken, mended, cooldown_s
        self._lock = threading.Lock()
        self._try_at = self._failed_at = 0.0
        self.closed = True
        """Whether all goes well, as far as is known."""
        self._told = False

    def admits(self) -> bool:
        if self.closed:
            return True
        with self._lock:
            now = time.monotonic()
            if self.closed or now < self._try_at:
                return self.closed
            self._try_at = now + self._cooldown_s  # this caller tries; the others go on without
            return True

    def failed(self, why: str) -> None:
        with self._lock:
            self._failed_at = time.monotonic()
            self._try_at = self._failed_at + self._cooldown_s
            if self.closed:
                self.closed = False
                log.warning("%s: %s", self._broken, why)
        metrics.redis(False)

    def succeeded(self, since: float) -> None:
        """A call that began at ``since`` (monotonic). One that was under way when another failed proves nothing."""
        if self.closed and self._told:
            return
        with self._lock:
            if since < self._failed_at:
                return
            was_closed, self.closed, self._told = self.closed, True, True
        if not was_closed:
            log.info("%s", self._mended)
        metrics.redis(True)


class RedisLink:
    """Bytes by name, with an end to their life. Raises (when made): SettingsError, MissingDependency."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, cooldown_s: float = COOLDOWN_S) -> None:
        redis = _import_redis()
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # Its own retries would multiply the wait.
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
                protocol=2,
            )
            pool.connection_class(**pool.connection_kwargs)  # finds options in the URL that there are not
        except (ValueError, TypeError):
            raise SettingsError("REDIS_URL is not a URL of Redis.", field="redis_url", remedy=_FORM) from None
        self._client: Any = redis.Redis(connection_pool=pool)
        self._failures = (redis.RedisError, OSError, ValueError)
        self._refused: type[Exception] = redis.ResponseError
        self._secret = str(pool.connection_kwargs.get("password") or "")
        self._reach = Breaker("Redis is left alone, it does not answer", "Redis answers again.", cooldown_s)
        self._room = Breaker("Redis takes no new answers", "Redis takes new answers again.", cooldown_s)
        self._lock = threading.Lock()
        self.num_errors = 0
        self.num_calls = 0
        self.busy_s = 0.0
        """Seconds that requests have waited for Redis."""

    @property
    def up(self) -> bool:
        """Whether Redis answered and took what it was given, as far as is known."""
        return self._reach.closed and self._room.closed

    def get(self, name: str, max_bytes: int) -> tuple[bytes, float] | None:
        """The value and the seconds it still has to live; None when there is none (or one that is larger)."""
        if not self._reach.admits():
            return None
        since = time.monotonic()
        try:
            with self._client.pipeline(transaction=False) as pipe:
                # Never more than we want: a value that somebody else put there may have any size.
                value, left_ms = pipe.getrange(name, 0, max_bytes).pttl(name).execute()
        except self._failures as error:
            self._failed(self._reach, error)
            return None
        finally:
            self._count(since)
        self._reach.succeeded(since)
        return (value, left_ms / 1000) if 0 < len(value) <= max_bytes and left_ms > 0 else None

    def set(self, name: str, value: bytes, ttl_s: int) -> bool:
        """Whether Redis has taken it."""
        if not (self._reach.closed and self._room.admits()):
            return False
        since = time.monotonic()
        try:
            self._client.set(name, value, ex=ttl_s)
        except self._refused as error:  # full, or a replica: what it has can still be read
            self._failed(self._room, error)
            return False
        except self._failures as error:
            self._failed(self._reach, error)
            return False
        finally:
            self._count(since)
        self._room.succeeded(since)
        return True

    def close(self) -> None:
        self._client.close()
        self._client.connection_pool.disconnect()

    def _count(self, since: float) -> None:
        with self._lock:
            self.num_calls += 1
            self.busy_s += time.monotonic() - since

    def _failed(self, breaker: Breaker, error: Exception) -> None:
        with self._lock:
            self.num_errors += 1
        why = f"{type(error).__name__}: {error}"
        breaker.failed(why.replace(self._secret, "***") if self._secret else why)


def check_redis_url(url: str) -> None:
    """Raises: SettingsError or MissingDependency when ``url`` can never work."""
    if url:
        RedisLink(url).close()


def _import_redis() -> Any:
    try:
        import redis.backoff
        import redis.retry
    except ImportError:
        raise MissingDependency(
            "REDIS_URL is set, but redis-py is not installed.",
            field="redis_url",
            remedy="Install it: pip install 'nano-gpt-api[redis]', or unset REDIS_URL.",
        ) from None
    return redis
