"""The response cache with a real Redis: shared by processes, and no request suffers when it is gone, slow or full."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import redis
from flask.testing import FlaskClient
from http_support import wait_for
from redis_support import RedisServer
from web_support import EchoClient, make_app

from nanogpt.errors import SettingsError
from nanogpt.web import cache as cache_module
from nanogpt.web.cache import CacheStats
from nanogpt.web.redis_link import RedisLink, check_redis_url

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: RedisServer) -> Iterator[RedisServer]:
    """Empty, and running again after a test that killed it."""
    if shared_server.process.poll() is not None:
        shared_server.start()
    with redis.Redis.from_url(shared_server.url) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
    yield shared_server
    shared_server.go_on()


@pytest.fixture
def admin(server: RedisServer) -> Iterator[Any]:
    with redis.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def link(server: RedisServer) -> Iterator[Callable[..., RedisLink]]:
    """Links that try again soon after a failure, unless told otherwise."""
    links: list[RedisLink] = []

    def make(url: str = server.url, **options: Any) -> RedisLink:
        links.append(RedisLink(url, **{"cooldown_s": 0.05, **options}))
        return links[-1]

    yield make
    for made in links:
        made.close()


class Worker:
    """An HTTP worker with an engine of its own that serves the same weights, and no memory beside Redis."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.engine = EchoClient()
        self.engine.status = replace(self.engine.status, digest="a" * 64)
        self.app = make_app(self.engine, redis_url=url, **{"cache_bytes": 0, **settings})

    def ask(self, **fields: Any) -> Any:
        http: FlaskClient = self.app.test_client()
        answer = http.post("/generate", json={"prompt": "abcdef", "max_length": 9, "seed": 1, **fields})
        assert answer.status_code == 200
        return answer

    @property
    def stats(self) -> CacheStats:
        stats: CacheStats = self.app.extensions["nanogpt.cache"]
        return stats


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, server: RedisServer) -> Callable[..., Worker]:
    monkeypatch.setattr(cache_module, "RedisLink", partial(RedisLink, cooldown_s=0.05))
    return lambda url=server.url, **settings: Worker(url, **settings)


def use(answer: Any) -> str:
    return str(answer.headers["X-Cache"])


# -- what it is for ---------------------------------------------------------------------------------------------


def test_one_worker_has_what_another_has_computed(worker: Callable[..., Worker]) -> None:
    one, other = worker(), worker()
    first, second = one.ask(), other.ask()
    assert (use(first), use(second)) == ("miss", "hit")
    assert {**first.json, "timings": 0} == {**second.json, "timings": 0}
    assert not other.engine.generations
    assert (one.stats.stores, other.stats.redis_hits, other.stats.redis_up) == (1, 1, True)
    assert other.stats.redis_s > 0


def test_what_comes_from_redis_is_in_memory_the_next_time(worker: Callable[..., Worker], server: RedisServer) -> None:
    worker().ask()
    other = worker(cache_bytes=1_000_000)
    other.ask()
    server.kill()
    assert use(other.ask()) == "hit"
    assert (other.stats.redis_hits, other.stats.memory_hits, other.stats.redis_errors) == (1, 1, 0)


def test_entries_have_an_end_and_hold_no_prompt(worker: Callable[..., Worker], admin: Any) -> None:
    worker(cache_ttl_s=77).ask(prompt="abcabcabc")
    (name,) = admin.keys()
    assert 0 < admin.ttl(name) <= 77
    assert b"abcabc" not in name + admin.get(name)


@pytest.mark.parametrize(
    "value",
    [b"", b"garbage", b"\x93\x01\x02\x03", b"x" * 1_000_000, "list"],
    ids=["empty", "text", "msgpack", "huge", "list"],
)
def test_what_somebody_else_left_there_is_a_miss(worker: Callable[..., Worker], admin: Any, value: bytes | str) -> None:
    first = worker().ask()
    (name,) = admin.keys()
    admin.delete(name)
    if value == "list":
        admin.rpush(name, "x")
    else:
        admin.set(name, value, ex=60)
    again = worker().ask()
    assert use(again) == "miss"
    assert again.json["generated_text"] == first.json["generated_text"]


def test_a_bad_value_is_replaced(worker: Callable[..., Worker], admin: Any, caplog: pytest.LogCaptureFixture) -> None:
    one = worker()
    one.ask()
    (name,) = admin.keys()
    admin.set(name, b"garbage", ex=60)
    assert [use(one.ask()) for _ in range(2)] == ["miss", "hit"]
    assert one.stats.bad_entries == 1
    assert "none of ours" in caplog.text


# -- gone, slow, full ---------------------------------------------------------------------------------------------


def test_a_redis_that_dies_in_mid_traffic_costs_no_request(
    worker: Callable[..., Worker], server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes, requests go on; it comes back, and is used again. The log has one line for each."""
    caplog.set_level(logging.INFO, "nanogpt.web.redis_link")
    one = worker()
    ends = threading.Event()

    def traffic(number: int) -> int:
        count = 0
        while not ends.is_set():
            one.ask(seed=count % 5)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(traffic, number) for number in range(4)]
        wait_for(lambda: one.stats.redis_hits > 20, 30.0, "Redis is used")
        server.kill()
        wait_for(lambda: one.stats.redis_up is False, 30.0, "its end is seen")
        misses = one.stats.misses
        wait_for(lambda: one.stats.misses > misses + 20, 30.0, "requests go on without")
        server.start()
        wait_for(lambda: one.stats.redis_up, 30.0, "it is used again")
        hits = one.stats.redis_hits
        wait_for(lambda: one.stats.redis_hits > hits + 20, 30.0, "and has answers again")
        ends.set()
        assert all(count.result() > 0 for count in counts)  # every one of them was answered 200
    lines = [record.message for record in caplog.records if record.name == "nanogpt.web.redis_link"]
    assert len(lines) == 2
    assert "left alone" in lines[0]
    assert lines[1] == "Redis answers again."


def test_a_redis_that_hangs_is_asked_once_and_then_left_alone(
    link: Callable[..., RedisLink], server: RedisServer
) -> None:
    slow = link(cooldown_s=3600.0)
    assert slow.set("a", b"x", 60)
    server.stop()
    assert slow.get("a", 100) is None  # after its time limit
    calls = slow.num_calls
    assert [slow.get("a", 100) for _ in range(100)] == [None] * 100
    assert not slow.set("b", b"x", 60)
    assert (slow.num_calls, slow.num_errors, slow.up) == (calls, 1, False)


def test_a_redis_that_hung_heals(link: Callable[..., RedisLink], server: RedisServer) -> None:
    slow = link()
    slow.set("a", b"x", 60)
    server.stop()
    assert slow.get("a", 100) is None
    server.go_on()
    found = wait_for(lambda: slow.get("a", 100), 30.0, "it answers again")
    assert found[0] == b"x"
    assert slow.up


def test_a_redis_that_is_full_still_gives_what_it_has(
    link: Callable[..., RedisLink], admin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nanogpt.web.redis_link")
    full = link()
    assert full.set("a", b"x", 60)
    admin.config_set("maxmemory-policy", "noeviction")
    admin.config_set("maxmemory", 1)
    assert not full.set("b", b"x", 60)
    found = full.get("a", 100)
    assert found is not None
    assert found[0] == b"x"
    assert (full.up, full.num_errors) == (False, 1)
    admin.config_set("maxmemory", 0)
    wait_for(lambda: full.set("b", b"x", 60), 30.0, "it takes new ones again")
    assert full.up
    lines = [record.message for record in caplog.records]
    assert [line[:30] for line in lines] == ["Redis takes no new answers: Ou", "Redis takes new answers again."]


def test_a_wrong_password_is_never_shown(
    worker: Callable[..., Worker], server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    one = worker(f"redis://:xyzzySecret@127.0.0.1:{server.port}/0")  # the server has none at all
    assert [use(one.ask()) for _ in range(2)] == ["miss", "miss"]
    assert (one.stats.redis_up, one.stats.redis_errors > 0) == (False, True)
    assert "Redis is left alone" in caplog.text
    assert "xyzzySecret" not in caplog.text


@pytest.mark.parametrize(
    "url", ["xyzzySecret", "http://:xyzzySecret@h", "redis://:xyzzySecret@h:port", "redis://:xyzzySecret@h?colour=1"]
)
def test_an_url_that_can_never_work_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_redis_url(url)
    assert "REDIS_URL" in str(caught.value)
    assert "xyzzySecret" not in str(caught.value)
    with pytest.raises(SettingsError):
        make_app(redis_url=url)
