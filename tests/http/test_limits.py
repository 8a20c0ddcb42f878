"""Limits, keys and closed routes of real servers: exact over four workers, and nothing of a key in the log."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from http_support import BIN, GUNICORN, START_S, Server, from_address, wait_for
from redis_server import RedisServer
from support import ROOT, require_service

from nanogpt.keys import add_key, digest, revoke_key

BODY = {"prompt": "To be", "max_length": 1}
API_KEY = "the-default-key"


def statuses(ask: Callable[[int], requests.Response], count: int) -> Counter[int]:
    """Of so many requests at once."""
    with ThreadPoolExecutor(count) as pool:
        return Counter(pool.map(lambda number: ask(number).status_code, range(count)))


def serve(folder: Path, *options: str, **environment: str) -> Server:
    folder.mkdir(exist_ok=True)
    return Server([str(BIN / GUNICORN[0]), *options, *GUNICORN[1:]], folder, environment, ROOT)


class Closed:
    """A server of four workers with an API key, a keys file, and a limit of 20 a minute."""

    def __init__(self, folder: Path) -> None:
        self.keys_file = folder / "keys.json"
        self.made = [add_key(self.keys_file, "first", {"requests_per_minute": 1000})]
        self.server = serve(
            folder, "-w", "4", API_KEY=API_KEY, NANOGPT_KEYS_FILE=str(self.keys_file), RATE_LIMIT="20 per minute"
        )

    def add(self, name: str, **limits: int) -> str:
        """A new key, once all workers know it."""
        self.made.append(add_key(self.keys_file, name, limits))
        self.wait_all(self.made[-1], 404)
        return self.made[-1]

    def wait_all(self, key: str, status: int) -> None:
        """Every worker answers a route that does not exist so: with 404 to those who may come in, 401 to others.

        Many at once: of requests one after another the worker that is awake may take them all.
        """
        ask = partial(self.server.get, "/none", headers={"X-API-Key": key})
        wait_for(lambda: statuses(lambda _: ask(), 48) == {status: 48}, 30.0, f"all workers answer {status}")

    def ask(self, key: str, **body: Any) -> requests.Response:
        return self.server.generate({**BODY, **body}, headers={"X-API-Key": key})


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    closed = Closed(tmp_path_factory.mktemp("closed"))
    try:
        closed.server.wait_ready()
        yield closed
    finally:
        closed.server.end()


def test_the_limit_is_exact_over_all_workers(closed: Closed) -> None:
    """Four workers that count for themselves admit four times the limit."""
    assert statuses(lambda _: closed.ask(API_KEY), 100) == {200: 20, 429: 80}
    refused = closed.ask(API_KEY)
    assert 1 <= int(refused.headers["Retry-After"]) <= 60


def test_tokens_a_minute_are_exact_over_all_workers(closed: Closed) -> None:
    """Texts that begin at once, each of which alone would fit."""
    key = closed.add("counted", requests_per_minute=1000, tokens_per_minute=100)
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: closed.ask(key, max_length=10, temperature=0), range(40)))
    used = [answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200]
    codes = Counter(answer.json()["code"] for answer in answers if answer.status_code != 200)
    assert set(codes) == {"tokens_limited"}
    assert 100 - max(used) < sum(used) <= 100, "as many as fit, and not one more"


def test_what_is_counted_outlives_the_engine(closed: Closed) -> None:
    key = closed.add("patient", requests_per_minute=3)
    assert [closed.ask(key).status_code for _ in range(2)] == [200, 200]
    os.kill(closed.server.pid_of("nanogpt.engine.process"), signal.SIGKILL)
    wait_for(lambda: closed.server.get("/ready").status_code == 503, START_S, "the engine is gone")
    closed.server.wait_ready()
    assert [closed.ask(key).status_code for _ in range(2)] == [200, 429]


def test_keys_come_and_go_in_all_workers_without_a_restart(closed: Closed) -> None:
    key = closed.add("fleeting", requests_per_minute=2)
    assert statuses(lambda _: closed.ask(key), 8) == {200: 2, 429: 6}
    revoke_key(closed.keys_file, "fleeting")
    closed.wait_all(key, 401)


def test_a_broken_keys_file_changes_nothing(closed: Closed) -> None:
    """Not even for workers that are born beside it."""
    good, first = closed.keys_file.read_text(), closed.made[0]
    closed.keys_file.write_text("half a fi")
    try:
        wait_for(
            lambda: closed.ask(first, prompt="").status_code == 400 and "The former keys stay" in closed.server.log,
            30.0,
            "it is logged",
        )
        old = set(closed.server.worker_pids())
        closed.server.signal(signal.SIGHUP)
        wait_for(lambda: not old & set(closed.server.worker_pids()), 30.0, "the workers are new")
        closed.wait_all(first, 404)
        closed.wait_all("ngk_nobodys", 401)
    finally:
        closed.keys_file.write_text(good)
    closed.add("mended")


def test_nothing_of_a_key_is_logged(closed: Closed) -> None:
    for key in closed.made:
        closed.ask(key, prompt="")
    log = closed.server.log
    for key in [*closed.made, API_KEY]:
        assert key[4:] not in log
        assert digest(key.encode())[:16] not in log
        for pid in closed.server.pids():
            assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


# -- addresses --------------------------------------------------------------------------------------------------


def ask_from(address: str, url: str, count: int, **headers: str) -> list[int]:
    with from_address(address) as session:
        return [
            session.post(f"{url}/generate", json=BODY, headers=headers, timeout=60).status_code for _ in range(count)
        ]


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An open server that expects one proxy in front."""
    server = serve(tmp_path_factory.mktemp("behind"), "-w", "2", NANOGPT_TRUSTED_PROXIES="1", RATE_LIMIT="2 per minute")
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


# The guide's block sends only the first header; ours both.
NGINX = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr warn;
events {{}}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path a; uwsgi_temp_path b; scgi_temp_path c;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass {url};
            proxy_set_header Host $host;
            proxy_set_header X-Real-IP $remote_addr;
            {more}
        }}
    }}
}}
"""


@pytest.mark.services
@pytest.mark.parametrize(
    "more", ["", "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"], ids=["guide", "ours"]
)
def test_behind_nginx_each_client_has_its_own_limit(behind: Server, tmp_path: Path, more: str) -> None:
    """With the guide's block, too, where all users had shared one; and nobody invents itself another address."""
    require_service("nginx", shutil.which("nginx") is not None, "make services installs it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "nginx.conf").write_text(NGINX.format(port=port, url=behind.url, more=more))
    command = ["nginx", "-p", str(tmp_path), "-c", "nginx.conf", "-e", "stderr"]
    nginx = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    first, second, forger = (f"127.0.{1 + bool(more)}.{number}" for number in (1, 2, 3))
    try:
        wait_for(lambda: listens(port), 30.0, "nginx listens")
        assert ask_from(first, url, 3) == [200, 200, 429]
        assert ask_from(second, url, 3) == [200, 200, 429]
        if more:
            assert ask_from(forger, url, 3, **{"X-Real-IP": "6.6.6.6"}) == [200, 200, 429]
            assert ask_from(forger, url, 3, **{"X-Forwarded-For": "6.6.6.7"}) == [429] * 3
        else:
            won = [ask_from(forger, url, 1, **{"X-Forwarded-For": f"6.6.6.{number}"})[0] for number in range(8)]
            assert won.count(200) == 2, "one more client, however many addresses are invented"
    finally:
        nginx.terminate()
        nginx.wait()


def test_a_forged_address_changes_nothing_on_an_open_server(tmp_path: Path) -> None:
    """By default, without proxies."""
    server = serve(tmp_path, RATE_LIMIT="3 per minute")
    try:
        server.wait_ready()
        forged = {"X-Forwarded-For": "1.2.3.", "X-Real-IP": "1.2.3.", "Forwarded": "for=1.2.3."}
        answers = [
            server.generate(BODY, headers={name: f"{value}{number}" for name, value in forged.items()}).status_code
            for number in range(6)
        ]
        assert answers == [200] * 3 + [429] * 3
        assert ask_from("127.0.0.9", server.url, 1) == [200]
        assert "Rate limit: 3 per minute for each client on the generating routes, counted on this host" in server.log
    finally:
        server.end()


def test_a_server_without_our_configuration_counts_as_well(tmp_path: Path) -> None:
    """Nobody has started a supervisor there: the first request does, and is counted by it."""
    command = [str(BIN / "flask"), "--app", "web.serve", "run", "--port", "0"]
    server = Server(command, tmp_path, {"RATE_LIMIT": "2 per minute"}, ROOT)
    try:
        found = wait_for(lambda: re.search(r"Running on (http://127\.0\.0\.1:\d+)", server.log), START_S, "it listens")
        server.url = found[1]
        assert [server.generate(BODY).status_code for _ in range(3)] == [200, 200, 429]
    finally:
        server.end()


# -- hosts ------------------------------------------------------------------------------------------------------


@pytest.mark.services
def test_with_redis_the_limit_is_exact_over_hosts_and_without_it_on_each(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    servers: list[Server] = []
    try:
        keys_file = tmp_path / "keys.json"
        keys = [add_key(keys_file, name, {"requests_per_minute": 20}) for name in ("shared", "alone", "again")]
        shared = {"REDIS_URL": redis.url, "NANOGPT_KEYS_FILE": str(keys_file)}
        servers.extend(serve(tmp_path / name, "-w", "2", **shared) for name in ("one", "two"))
        for server in servers:
            server.wait_ready()

        def ask(key: str) -> Callable[[int], requests.Response]:
            return lambda number: servers[number % 2].generate(BODY, headers={"X-API-Key": key})

        assert statuses(ask(keys[0]), 60) == {200: 20, 429: 40}
        redis.stop()
        assert statuses(ask(keys[1]), 80) == {200: 40, 429: 40}, "each host keeps the limit for itself"
        assert all(server.log.count("Redis does not count") <= 2 for server in servers), "once a worker"
        redis.start()
        wait_for(
            lambda: ask(keys[1])(0).status_code and ask(keys[1])(1).status_code
            and all(server.log.count("Redis counts again") == server.log.count("Redis does not") for server in servers),
            30.0,
            "it heals by itself",
        )  # fmt: skip
        assert statuses(ask(keys[2]), 60) == {200: 20, 429: 40}
    finally:
        redis.stop()
        for server in servers:
            server.end()
