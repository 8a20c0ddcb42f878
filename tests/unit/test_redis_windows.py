"""Windows in a real Redis: the same account as in memory, exact over hosts, and what happens when Redis does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from redis_server import RedisServer

from nanogpt.engine.windows import MAX_ENTRIES, Counters, Rule, Windows
from nanogpt.errors import TooManyRequests
from nanogpt.settings import Settings
from nanogpt.web import redis_windows
from nanogpt.web.caller import Caller
from nanogpt.web.engine import EngineHandle
from nanogpt.web.limits import Limiter
from nanogpt.web.metrics import metrics
from nanogpt.web.redis_windows import RedisWindows

pytestmark = pytest.mark.services

RULES = [Rule("requests", 50, 60)]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def fresh(redis: RedisServer) -> None:
    RedisWindows(redis.url)._redis.flushall()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which Redis shall not be found slow: this machine may be busy."""
    monkeypatch.setattr(redis_windows, "_TIMEOUT_S", 20.0)


@pytest.fixture
def windows(redis: RedisServer, patient: None) -> RedisWindows:
    return RedisWindows(redis.url)


def test_it_is_exact_over_hosts_and_threads(redis: RedisServer, patient: None) -> None:
    hosts = [RedisWindows(redis.url) for _ in range(3)]
    with ThreadPoolExecutor(24) as pool:
        taken = list(pool.map(lambda number: hosts[number % 3].take("a", RULES), range(200)))
    assert sum(one.admitted for one in taken) == 50
    assert sorted(one.states[0].remaining for one in taken if one.admitted) == list(range(50))


SCRIPT: list[tuple[Any, ...]] = [
    ("take", "a", [Rule("requests", 3, 60)], 1),
    ("take", "a", [Rule("requests", 3, 60), Rule("requests", 2, 1)], 1),
    ("take", "a", [Rule("requests", 3, 60), Rule("requests", 1, 1)], 1),
    ("take", "a", [Rule("requests", 3, 60)], 1),
    ("take", "a", [Rule("requests", 3, 60)], 1),
    ("take", "a", [Rule("requests", 5, 60)], 1),
    ("take", "b", [Rule("requests", 3, 60)], 1),
    ("take", "a", [Rule("tokens", 100, 60)], 70, "h1"),
    ("take", "a", [Rule("tokens", 100, 60)], 31, "h2"),
    ("take", "a", [Rule("tokens", 100, 60)], 30, "h3"),
    ("settle", "a", [Rule("tokens", 100, 60)], "h1", 20),
    ("settle", "a", [Rule("tokens", 100, 60)], "h1", 0),
    ("settle", "a", [Rule("tokens", 100, 60)], "h9", 10),
    ("take", "a", [Rule("tokens", 100, 60)], 51),
    ("take", "a", [Rule("tokens", 100, 60)], 50, "h4"),
    ("settle", "a", [Rule("tokens", 100, 60)], "h3", 10_000),
    ("settle", "a", [Rule("tokens", 100, 60)], "h4", -5),
    ("take", "a", [Rule("tokens", 100, 60)], 51),
    ("take", "a", [Rule("tokens", 10**6, 60)], 5000),
    ("take", "a", [Rule("tokens", 10**6, 60)], 5000, "h5"),
    ("settle", "a", [Rule("tokens", 10**6, 60)], "h5", 70),
    ("take", "a", [Rule("tokens", 10**6, 60)], 989_881),
    ("take", "a", [Rule("tokens", 10**6, 60)], 989_880),
]


def play(counters: Counters) -> list[Any]:
    told: list[Any] = []
    for what, client, rules, *rest in SCRIPT:
        if what == "settle":
            counters.settle(client, rules, *rest)
            continue
        amount, hold = (*rest, "")[:2]
        taken = counters.take(client, rules, amount, hold=hold, hold_s=300)
        states = [(s.remaining, round(s.reset_s, -1), round(s.retry_after_s, -1)) for s in taken.states]
        told.append((what, client, amount, taken.admitted, states))
    return told


def test_it_keeps_the_same_account_as_memory(windows: RedisWindows) -> None:
    assert play(windows) == play(Windows())


def test_what_was_counted_leaves_in_time(windows: RedisWindows) -> None:
    rules = [Rule("requests", 2, 1)]
    admitted = 0
    start = time.monotonic()
    while admitted < 6:
        taken = windows.take("a", rules)
        admitted += taken.admitted
        if not taken.admitted:
            assert 0 < taken.states[0].retry_after_s <= 1
            time.sleep(taken.states[0].retry_after_s)
    assert time.monotonic() - start >= 2.0, "six within less than two periods are more than two in one"


def test_a_hold_of_a_host_that_died_leaves(windows: RedisWindows) -> None:
    rules = [Rule("tokens", 10, 1)]
    assert windows.take("a", rules, 10, hold="h", hold_s=0.3).admitted
    assert not windows.take("a", rules, 1).admitted
    deadline = time.monotonic() + 30
    while not windows.take("a", rules, 10).admitted:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_redis_keeps_no_more_than_it_must(windows: RedisWindows) -> None:
    rules = [Rule("requests", 10**6, 1), Rule("tokens", 10, 1)]
    for _ in range(200):
        windows.take("a", rules)
    names = windows._redis.keys("*")
    assert sorted(names) == [
        b"nanogpt:window:{a}:requests:1:amounts", b"nanogpt:window:{a}:requests:1:leaving",
        b"nanogpt:window:{a}:tokens:1:amounts", b"nanogpt:window:{a}:tokens:1:leaving",
    ]  # fmt: skip
    assert all(0 < windows._redis.pttl(name) <= 3000 for name in names)
    assert windows._redis.zcard(names[0].replace(b"amounts", b"leaving")) <= MAX_ENTRIES + 1


# -- without Redis ----------------------------------------------------------------------------------------------


@pytest.fixture
def limiter(redis: RedisServer, patient: None) -> Limiter:
    """Tries Redis again at once, and has an account of its own meanwhile."""
    settings = Settings(redis_url=redis.url, rate_limit="5 per minute")
    limiter = Limiter(settings, EngineHandle(settings), Windows())
    limiter._breaker._cooldown_s = 0.0
    return limiter


def admitted(limiter: Limiter, name: str, count: int) -> int:
    number = 0
    for _ in range(count):
        with suppress(TooManyRequests):
            limiter.admit(Caller(name))
            number += 1
    return number


def recover(limiter: Limiter) -> None:
    deadline = time.monotonic() + 30
    while not limiter.redis_ok:
        admitted(limiter, "somebody", 1)
        assert time.monotonic() < deadline


def failures() -> float:
    """Calls to Redis that failed, as this process counts them for /metrics."""
    samples = [sample for family in metrics.collect() for sample in family.samples]
    return next((sample.value for sample in samples if sample.name == "nanogpt_redis_failures_total"), 0.0)


def test_redis_gone_and_back(redis: RedisServer, limiter: Limiter, caplog: pytest.LogCaptureFixture) -> None:
    """This host counts meanwhile, the limit holds on it, the log has a line for each change, and it heals by itself."""
    caplog.set_level("INFO")
    assert limiter.redis_ok is True
    assert admitted(limiter, "a", 7) == 5
    before = failures()
    redis.stop()
    try:
        assert admitted(limiter, "b", 7) == 5
        assert limiter.redis_ok is False
        assert failures() - before >= 7
    finally:
        redis.start()
    recover(limiter)
    assert admitted(limiter, "c", 7) == 5
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(";")[0] for line in lines] == ["Redis does not count", "Redis counts again."]


def test_a_redis_that_hangs_holds_up_one_request_in_a_while(
    redis: RedisServer, limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter._breaker._cooldown_s = 3600.0
    monkeypatch.setattr(redis_windows, "_TIMEOUT_S", 0.1)
    limiter._redis = RedisWindows(redis.url)
    tries = 0
    run = limiter._redis._run

    def counted(*args: Any) -> Any:
        nonlocal tries
        tries += 1
        return run(*args)

    monkeypatch.setattr(limiter._redis, "_run", counted)
    redis.freeze()
    try:
        assert admitted(limiter, "b", 50) == 5
        assert tries == 1
    finally:
        redis.thaw()
    limiter._breaker._cooldown_s = limiter._breaker._try_at = 0.0
    recover(limiter)


def test_a_full_redis_is_like_none(redis: RedisServer, limiter: Limiter) -> None:
    admin = RedisWindows(redis.url)._redis
    admin.config_set("maxmemory-policy", "noeviction")
    admin.config_set("maxmemory", "1")
    try:
        assert admitted(limiter, "a", 7) == 5
        assert limiter.redis_ok is False
    finally:
        admin.config_set("maxmemory", "0")
    recover(limiter)


def test_tokens_are_settled_where_they_were_taken(redis: RedisServer, limiter: Limiter) -> None:
    """Else a hold would stay on the one side and be given back on the other."""
    alice = Caller("key:alice", tokens_per_minute=100)
    settle, _ = limiter.reserve(alice, 100)
    redis.stop()
    try:
        settle_here, _ = limiter.reserve(alice, 100)
        settle(5)  # lost with Redis' account; it must not touch this host's
        with pytest.raises(TooManyRequests):
            limiter.reserve(alice, 1)
        settle_here(40)
        limiter.reserve(alice, 60)
    finally:
        redis.start()
    recover(limiter)


def test_a_wrong_password_is_like_no_redis(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(redis_url=redis.url.replace("//", "//user:passw0rd@"), rate_limit="5 per minute")
    limiter = Limiter(settings, EngineHandle(settings), Windows())
    assert admitted(limiter, "a", 7) == 5
    assert limiter.redis_ok is False
    assert "passw0rd" not in caplog.text


def test_a_redis_that_is_not_there_stops_no_start() -> None:
    """Making the app connects to nothing."""
    settings = Settings(redis_url="redis://127.0.0.1:1/0")
    assert Limiter(settings, EngineHandle(settings), Windows()).redis_ok is True
