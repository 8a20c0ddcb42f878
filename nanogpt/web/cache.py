"""The response cache: answers that must repeat are computed once. In this process's memory, and in Redis where one is.

What must repeat is what was asked for greedily or with a seed. Its name is a hash over all that the answer depends on,
the weights above all: nothing in the cache is ever out of date, and a reload has nothing to clear. Used by all threads
of a worker. Knows no HTTP and no engine; ``flights`` puts it to use.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgpack

from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.web.cache_entry import FORMAT, Entry, unpack
from nanogpt.web.redis_link import RedisLink

log = logging.getLogger(__name__)

HIT, MISS, BYPASS = "hit", "miss", "bypass"
"""What ``X-Cache`` says: the engine did nothing for this answer; it did; the cache was not asked."""

# Python's own share of an entry in memory: its name, the bytes object, the places in the table.
_ENTRY_OVERHEAD_BYTES = 300


class CacheStats:
    """What the cache of this process has done since it started, for metrics. Read the attributes, do not keep them.

    ``hits`` are answers without a generation of their own: ``memory_hits``, ``redis_hits``, and ``joins`` (those that
    listened to an identical request's). ``redis_s`` are the seconds that requests have waited for Redis.
    """

    def __init__(self, redis: RedisLink | None = None) -> None:
        self._lock = threading.Lock()
        self._redis = redis
        self.memory_hits = 0
        self.redis_hits = 0
        self.joins = 0
        self.misses = 0
        self.bypasses = 0
        self.stores = 0
        self.bad_entries = 0
        self.entries = 0
        self.bytes = 0

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            setattr(self, name, getattr(self, name) + number)

    @property
    def hits(self) -> int:
        return self.memory_hits + self.redis_hits + self.joins

    @property
    def redis_errors(self) -> int:
        return self._redis.num_errors if self._redis else 0

    @property
    def redis_calls(self) -> int:
        return self._redis.num_calls if self._redis else 0

    @property
    def redis_s(self) -> float:
        return self._redis.busy_s if self._redis else 0.0

    @property
    def redis_up(self) -> bool | None:
        """Whether Redis does what it should, as far as is known. None: there is none."""
        return self._redis.up if self._redis else None


class MemoryCache:
    """Packed entries by name, the least recently used one goes first. Bounded in bytes and in time."""

    def __init__(self, max_bytes: int, stats: CacheStats) -> None:
        self._max_bytes = max_bytes
        self._stats = stats
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> bytes | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            if found[1] <= time.monotonic():
                self._drop(key)
                return None
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: bytes, packed: bytes, ttl_s: float) -> None:
        size = len(packed) + _ENTRY_OVERHEAD_BYTES
        if size > self._max_bytes:
            return
        with self._lock:
            if key in self._entries:
                self._drop(key)
            self._entries[key] = packed, time.monotonic() + ttl_s
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._entries)))
            self._stats.entries, self._stats.bytes = len(self._entries), self._bytes

    def _drop(self, key: bytes) -> None:
        packed, _ = self._entries.pop(key)
        self._bytes -= len(packed) + _ENTRY_OVERHEAD_BYTES
        self._stats.entries, self._stats.bytes = len(self._entries), self._bytes


class ResponseCache:
    """Entries by key: first this process's memory, then Redis. Raises (when made): SettingsError, MissingDependency."""

    def __init__(self, settings: Settings) -> None:
        self._on = settings.response_cache
        self._ttl_s = settings.cache_ttl_s
        self._context_overflow = settings.context_overflow
        self.max_entry_bytes = settings.cache_entry_bytes
        self._redis = RedisLink(settings.redis_url) if self._on and settings.redis_url else None
        self.stats = CacheStats(self._redis)
        self._memory = MemoryCache(settings.cache_bytes, self.stats)
        self._said_bad = False

    def key(self, fingerprint: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> bytes | None:
        """The name of the request's answer; None when it need not repeat, or when nobody knows what makes it.

        ``fingerprint`` stands for the engine: its weights, tokenizer and arithmetic.
        """
        if not self._on or not fingerprint or not (params.greedy or params.seed is not None):
            return None
        asked = {name: _canonical(value) for name, value in params.to_wire().items()}
        if params.greedy:
            asked.pop("seed", None)  # nothing is drawn
        parts = [FORMAT, fingerprint, self._context_overflow, list(prompt_token_ids), asked]
        return hashlib.sha256(msgpack.packb(parts)).digest()

    def recall(self, key: bytes) -> bytes | None:
        """From this process's memory: packed, and known to be good."""
        return self._memory.get(key)

    def recall_shared(self, key: bytes, num_prompt_tokens: int, params: SamplingParams) -> Entry | None:
        """From Redis, in a bounded time. What is found is kept here, for as long as it may live there."""
        found = self._redis.get(_name(key), self.max_entry_bytes) if self._redis else None
        if found is None:
            return None
        packed, left_s = found
        try:
            entry = unpack(packed, key, num_prompt_tokens, params)
        except ValueError as error:
            self.stats.add("bad_entries")
            if not self._said_bad:
                self._said_bad = True
                log.warning("Redis holds answers that are none of ours (%s). They are taken for missing.", error)
            return None
        self._memory.put(key, packed, min(left_s, self._ttl_s))
        return entry

    def keep(self, key: bytes, entry: Entry, params: SamplingParams) -> bytes | None:
        """Into this process's memory. Returns the packed entry for ``keep_shared``; None if it cannot be kept."""
        packed = entry.pack(key)
        if len(packed) > self.max_entry_bytes:
            return None
        try:
            unpack(packed, key, entry.num_prompt_tokens, params)
        except ValueError as error:  # it would be refused when it is needed
            log.error("The engine's answer cannot be kept (%s).", error)
            return None
        self._memory.put(key, packed, self._ttl_s)
        self.stats.add("stores")
        return packed

    def keep_shared(self, key: bytes, packed: bytes) -> None:
        """Into Redis, in a bounded time."""
        if self._redis:
            self._redis.set(_name(key), packed, self._ttl_s)


def _name(key: bytes) -> str:
    return f"nanogpt:answer:{key.hex()}"


def _canonical(value: Any) -> Any:
    """Equal values as equal bytes: 1 and 1.0 ask for the same, and so does a table of biases in another order."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return sorted((name, _canonical(item)) for name, item in value.items())
    return list(value) if isinstance(value, tuple) else value
