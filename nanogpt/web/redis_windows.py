"""``nanogpt.engine.windows`` in Redis' own language: one script, by Redis' own clock, exact over all hosts.

Of each window Redis keeps a sorted set (entry → when it leaves) and a hash (entry → amount, and their total). Both
expire with their last entry. Called by a worker's threads; waits for Redis as long as ``_TIMEOUT_S`` and never tries
twice: what to do without Redis is the caller's matter. Needs the package redis (the extra ``redis``), imported late.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from nanogpt.engine.windows import MAX_ENTRIES, UNKNOWN_RETRY_S, Rule, State, Taken
from nanogpt.errors import MissingDependency, ServiceUnavailable, SettingsError

# A Redis in the same network answers within a millisecond; a request waits no longer than this for one that does not.
_TIMEOUT_S = 0.25
MAX_CONNECTIONS = 16
"""Connections of one worker process; more threads than this wait for each other."""
_POOL_S = 2.0
_PREFIX = "nanogpt:window"

# Shared by both scripts. Times are seconds as numbers; as text with all their digits, which tostring would cut off.
_COMMON = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local function text(seconds) return string.format('%.6f', seconds) end
local function lapse(leaving, amounts)
  local gone = redis.call('ZRANGEBYSCORE', leaving, '-inf', text(now))
  for _, entry in ipairs(gone) do
    redis.call('HINCRBY', amounts, 'total', -(redis.call('HGET', amounts, entry) or 0))
    redis.call('HDEL', amounts, entry)
    redis.call('ZREM', leaving, entry)
  end
end
local function add(leaving, amounts, entry, amount, leaves_at)
  redis.call('HINCRBY', amounts, entry, amount)
  redis.call('HINCRBY', amounts, 'total', amount)
  redis.call('ZADD', leaving, text(leaves_at), entry)
  local last = redis.call('ZREVRANGE', leaving, 0, 0, 'WITHSCORES')
  for _, key in ipairs({leaving, amounts}) do
    redis.call('PEXPIRE', key, math.ceil((tonumber(last[2]) - now) * 1000) + 1000)
  end
end
local function add_used(leaving, amounts, entry, amount, limit, period, max_entries)
  local leaves_at = now + period
  if limit > max_entries then
    local quantum = period / max_entries
    entry = 'q' .. string.format('%.0f', math.ceil(leaves_at / quantum))
    leaves_at = math.ceil(leaves_at / quantum) * quantum
  end
  add(leaving, amounts, entry, amount, leaves_at)
end
"""

# KEYS: two for each rule. ARGV: entry, hold_s (-1: nothing is held), amount, max_entries; then limit, period_s each.
_TAKE = (
    _COMMON
    + """
local entry, hold_s, amount, max_entries = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local admitted, before = 1, {}
for i = 1, #KEYS / 2 do
  local leaving, amounts, limit = KEYS[2 * i - 1], KEYS[2 * i], tonumber(ARGV[2 * i + 3])
  lapse(leaving, amounts)
  before[i] = tonumber(redis.call('HGET', amounts, 'total') or 0)
  if before[i] + amount > limit then admitted = 0 end
end
local answer = {admitted}
for i = 1, #KEYS / 2 do
  local leaving, amounts = KEYS[2 * i - 1], KEYS[2 * i]
  local limit, period = tonumber(ARGV[2 * i + 3]), tonumber(ARGV[2 * i + 4])
  local excess, retry, reset = before[i] + amount - limit, 0, -1
  if excess > 0 then retry = -1 end
  if admitted == 1 and hold_s >= 0 then
    add(leaving, amounts, 'h' .. entry, amount, now + hold_s + period)
  elseif admitted == 1 then
    add_used(leaving, amounts, 'e' .. entry, amount, limit, period, max_entries)
  end
  local from = 0
  repeat
    local page = redis.call('ZRANGE', leaving, from, from + 63, 'WITHSCORES')
    for j = 1, #page, 2 do
      if string.sub(page[j], 1, 1) ~= 'h' then
        if reset < 0 then reset = tonumber(page[j + 1]) - now end
        if excess > 0 then
          excess = excess - (redis.call('HGET', amounts, page[j]) or 0)
          if excess <= 0 then retry = tonumber(page[j + 1]) - now end
        end
      end
    end
    from = from + 64
  until #page == 0 or (reset >= 0 and excess <= 0)
  local total = before[i]
  if admitted == 1 then total = total + amount end
  answer[#answer + 1] = {math.max(0, limit - total), total, text(reset), text(retry)}
end
return answer
"""
)

# KEYS: two. ARGV: entry, used, max_entries, limit, period_s.
_SETTLE = (
    _COMMON
    + """
local leaving, amounts, hold = KEYS[1], KEYS[2], 'h' .. ARGV[1]
lapse(leaving, amounts)
local held = tonumber(redis.call('HGET', amounts, hold))
if held then
  redis.call('HINCRBY', amounts, 'total', -held)
  redis.call('HDEL', amounts, hold)
  redis.call('ZREM', leaving, hold)
  local used = math.max(0, math.min(held, tonumber(ARGV[2])))
  if used > 0 then
    add_used(leaving, amounts, 'e' .. ARGV[1], used, tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[3]))
  end
end
return 1
"""
)


class RedisUnavailable(ServiceUnavailable):
    """Redis did not count: it is gone, slow, or full. Never seen by a client: this host counts instead."""


class RedisWindows:
    """Counters in Redis. Raises RedisUnavailable from both methods. Safe to share between threads and over a fork."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet. Raises: MissingDependency, SettingsError for what is no Redis URL."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise MissingDependency(
                "REDIS_URL is set, and the package redis is not installed.", remedy="pip install 'nano-gpt-api[redis]'"
            ) from None
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=_POOL_S,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, TypeError):  # their messages quote the URL, and it may hold a password
            raise SettingsError(
                "REDIS_URL is no Redis URL.", field="redis_url", remedy="It looks like redis://cache:6379/0."
            ) from None
        self._errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._redis = redis.Redis(connection_pool=pool)
        self._take = self._redis.register_script(_TAKE)
        self._settle = self._redis.register_script(_SETTLE)

    def take(
        self, client: str, rules: Sequence[Rule], amount: int = 1, *, hold: str = "", hold_s: float = 0.0
    ) -> Taken:
        args: list[Any] = [hold or uuid.uuid4().hex, hold_s if hold else -1, amount, MAX_ENTRIES]
        for rule in rules:
            args += [rule.limit, rule.period_s]
        admitted, *states = self._run(self._take, client, rules, args)
        return Taken(bool(admitted), [_state(*state) for state in states])

    def settle(self, client: str, rules: Sequence[Rule], hold: str, used: int) -> None:
        for rule in rules:
            self._run(self._settle, client, [rule], [hold, used, MAX_ENTRIES, rule.limit, rule.period_s])

    def _run(self, script: Any, client: str, rules: Sequence[Rule], args: list[Any]) -> Any:
        # In braces: what a cluster chooses the node by, so that all windows of a client are on one.
        names = [f"{_PREFIX}:{{{client}}}:{rule.kind}:{rule.period_s}" for rule in rules]
        keys = [key for name in names for key in (f"{name}:leaving", f"{name}:amounts")]
        try:
            return script(keys=keys, args=args)
        except self._errors as error:
            # Those that are idle broke as well, most probably; each would fail once.
            self._redis.connection_pool.disconnect(inuse_connections=False)
            raise RedisUnavailable(f"{type(error).__name__}: {error}") from None


def _state(remaining: int, total: int, reset: bytes, retry: bytes) -> State:
    reset_s, retry_s = float(reset), float(retry)
    if reset_s < 0:  # nothing there, or everything is held
        reset_s = UNKNOWN_RETRY_S if total else 0.0
    return State(remaining, reset_s, UNKNOWN_RETRY_S if retry_s < 0 else retry_s)
