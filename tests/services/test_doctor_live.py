"""``nanogpt doctor --url`` as an operator uses it: a real server, behind a real nginx that is well or badly configured.

Whose address counts is asked of the real app with an engine that echoes: three numbers of trusted proxies, two nginx
blocks, and no model needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from http_support import BIN, GUNICORN, START_S, Server, running, wait_for
from redis_server import RedisServer
from support import ROOT, require_service
from web_support import make_app
from werkzeug.serving import WSGIRequestHandler, make_server

from nanogpt import cli
from nanogpt.checkpoint.locate import EMBEDDED
from nanogpt.doctor import configuration, live, proxy
from nanogpt.doctor.findings import Check, Finding
from nanogpt.doctor.here import Here
from nanogpt.doctor.readings import Gpu, Machine
from nanogpt.doctor.service import Answer, Service
from nanogpt.settings import Settings

pytestmark = pytest.mark.services

API_KEY, ADMIN_KEY = "doctor-tests-api-key", "doctor-tests-admin-key"
SETS_ADDRESS = """
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
"""
PASSES = SETS_ADDRESS + "proxy_http_version 1.1; proxy_buffering off; proxy_read_timeout 300s;"
# nginx obeys the server's own header X-Accel-Buffering, unless it is told not to.
COLLECTS = SETS_ADDRESS + "proxy_ignore_headers X-Accel-Buffering; proxy_buffering on; proxy_buffers 16 64k;"
COLLECTS_A_LITTLE = SETS_ADDRESS + "proxy_ignore_headers X-Accel-Buffering; proxy_buffering on; proxy_buffer_size 4k;"
IMPATIENT = SETS_ADDRESS + "proxy_read_timeout 20ms;"
ANSWERS_ITSELF = "return 301 https://elsewhere.example.com/;"
NGINX = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr warn;
events {{}}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path a; uwsgi_temp_path b; scgi_temp_path c;
    {servers}
}}
"""
Start = Callable[..., str]


def the_one(check: Check[Service], service: Service) -> Finding:
    findings = list(check.run(service))
    return next((finding for finding in findings if finding.status != "ok"), findings[0])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """``behind(url, block)``: the address of a real nginx before ``url``."""
    require_service("nginx", shutil.which("nginx") is not None, "make services installs it")
    running: list[subprocess.Popen[bytes]] = []

    def start(url: str, block: str, *, tls: str = "") -> str:
        folder = tmp_path_factory.mktemp("nginx")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        location = f"location / {{ {block} {'' if 'return' in block else f'proxy_pass {url};'} }}"
        servers = f"server {{ listen 127.0.0.1:{port}{' ssl' if tls else ''}; {tls} {location} }}"
        (folder / "nginx.conf").write_text(NGINX.format(servers=servers))
        command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
        running.append(subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL))
        wait_for(lambda: listens(port), START_S, "nginx listens")
        return f"http{'s' if tls else ''}://127.0.0.1:{port}"

    yield start
    for process in running:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A closed server of the embedded model: its longest answer takes a tenth of a second at least."""
    folder = tmp_path_factory.mktemp("server")
    environment = {
        "API_KEY": API_KEY,
        "ADMIN_KEY": ADMIN_KEY,
        "NANOGPT_TRUSTED_PROXIES": "1",
        "RATE_LIMIT": "1000 per minute",
    }
    with running([str(BIN / GUNICORN[0]), *GUNICORN[1:]], folder, environment, ROOT) as server:
        yield server


def service(url: str) -> Service:
    return Service(url, api_key=API_KEY, admin_key=ADMIN_KEY)


# -- what a proxy does to answers -------------------------------------------------------------------------------


def test_a_stream_that_comes_as_it_is_written_is_told_from_one_that_a_proxy_collects(
    server: Server, behind: Start
) -> None:
    assert the_one(proxy.streaming, service(server.url)).status == "ok"
    assert the_one(proxy.streaming, service(behind(server.url, PASSES))).status == "ok"
    for block in (COLLECTS, COLLECTS_A_LITTLE):
        held = the_one(proxy.streaming, service(behind(server.url, block)))
        assert (held.status, held.see) == ("fail", "docs/troubleshooting.md#streams-come-all-at-once"), held
        assert "proxy_buffering off" in held.remedy


def test_a_proxy_that_gives_up_before_the_longest_answer_fails(server: Server, behind: Start) -> None:
    assert "comes through" in the_one(proxy.timeouts, service(server.url)).says
    impatient = the_one(proxy.timeouts, service(behind(server.url, IMPATIENT)))
    assert impatient.status == "fail"
    assert "nginx" in impatient.says
    assert "504" in impatient.says
    assert "proxy_read_timeout" in impatient.remedy


def test_a_proxy_that_answers_itself_is_no_service(server: Server, behind: Start) -> None:
    finding = the_one(live.health, service(behind(server.url, ANSWERS_ITSELF)))
    assert finding.status == "fail"
    assert "301 and points to https://elsewhere.example.com/" in finding.says


def test_a_certificate_that_is_not_trusted_or_ends_soon_is_told(
    server: Server, behind: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_service("openssl", shutil.which("openssl") is not None, "make services installs it")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3", "-subj", "/CN=doctor",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    tls = f"ssl_certificate {tmp_path}/certificate.pem; ssl_certificate_key {tmp_path}/key.pem;"
    url = behind(server.url, PASSES, tls=tls)
    untrusted = the_one(live.health, service(url))
    assert (untrusted.status, "certificate" in untrusted.says) == ("fail", True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    assert the_one(live.health, service(url)).status == "ok"
    ends = the_one(proxy.transport, service(url))
    assert (ends.status, "the certificate holds until" in ends.says) == ("warn", True)


# -- who a client is taken for ----------------------------------------------------------------------------------


class Quiet(WSGIRequestHandler):
    def log_request(self, *args: object) -> None:
        pass


@pytest.fixture
def app() -> Iterator[Callable[..., str]]:
    """``app(trusted_proxies=1)``: the address of the real app with these settings, open to everybody."""
    running: list[tuple[Any, threading.Thread]] = []

    def start(**settings: Any) -> str:
        made = make_server("127.0.0.1", 0, make_app(**settings), threaded=True, request_handler=Quiet)
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        running.append((made, thread))
        return f"http://127.0.0.1:{made.port}"

    yield start
    for made, thread in running:
        made.shutdown()
        thread.join()
        made.server_close()


@pytest.mark.parametrize(
    ("trusted", "block", "status", "says"),
    [
        (0, None, "ok", "its own address"),
        (1, None, "fail", "invents an address"),
        (0, SETS_ADDRESS, "fail", "share one limit"),
        (1, SETS_ADDRESS, "ok", "its own address"),
        (2, SETS_ADDRESS, "fail", "invents an address"),
        (1, "proxy_set_header X-Real-IP $remote_addr;", "warn", "counted as the proxy"),
        (1, "proxy_http_version 1.1;", "fail", "invents an address"),
    ],
    ids=["direct", "direct, one is believed", "one proxy, none believed", "one proxy", "one proxy, two believed",
         "the guide's block", "a proxy that tells nothing"],
)  # fmt: skip
def test_a_wrong_number_of_proxies_is_seen_from_outside(
    app: Callable[..., str], behind: Start, trusted: int, block: str | None, status: str, says: str
) -> None:
    url = app(trusted_proxies=trusted, rate_limit="100 per minute")
    finding = the_one(proxy.proxies, Service(url if block is None else behind(url, block)))
    assert (finding.status, says in finding.says) == (status, True), finding


def test_where_nothing_is_counted_by_address_the_number_does_not_matter(app: Callable[..., str]) -> None:
    assert "RATE_LIMIT is off" in the_one(proxy.proxies, Service(app())).says
    assert "by their keys" in the_one(proxy.proxies, Service(app(api_key="k"), api_key="k")).says


def test_a_client_at_its_limit_is_told_to_come_back_and_nothing_is_concluded(app: Callable[..., str]) -> None:
    limited = Service(app(rate_limit="1 per minute"))
    assert limited.post("/generate", {}).status == 400
    finding = the_one(proxy.streaming, limited)
    assert (finding.status, "Not measured" in finding.says) == ("warn", True)
    assert " s, or with a key" in finding.remedy


def test_open_routes_and_keys_that_are_refused_are_seen(app: Callable[..., str]) -> None:
    opened = the_one(live.keys, Service(app()))
    assert (opened.status, "/v1/models" in opened.says, "/generate" in opened.says) == ("warn", True, True)
    url = app(api_key="right")
    assert the_one(live.keys, Service(url, api_key="right")).status == "ok"
    assert "is refused" in the_one(live.keys, Service(url, api_key="other")).says
    assert "is not set here" in the_one(live.keys, Service(url)).says


def test_what_is_a_warning_on_this_machine_fails_where_others_reach_it(app: Callable[..., str]) -> None:
    """The address is this machine's, and is looked at as if it were another's."""

    def beyond(url: str, **keys: str) -> Service:
        service = Service(url, **keys)
        service.is_local = service.is_private = False
        return service

    assert the_one(live.keys, beyond(app())).status == "fail"
    assert the_one(live.limits, beyond(app())).status == "warn"
    assert the_one(proxy.transport, beyond(app())).status == "warn"
    closed = beyond(app(admin_key="a", api_key="k"), api_key="k")
    assert "can be reached from outside" in the_one(live.admin, closed).says
    assert the_one(live.admin, beyond(app(api_key="k"), api_key="k")).status == "ok"


def test_a_clock_that_is_off_is_seen_by_the_date_of_an_answer(
    app: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Service(app())
    assert the_one(live.clock, here).status == "ok"
    ask = here.get

    def an_hour_ago(path: str, key: Any = "api", **headers: str) -> Answer:
        answer = ask(path, key, **headers)
        return dataclasses.replace(answer, asked_at=answer.asked_at - 3600)

    monkeypatch.setattr(here, "get", an_hour_ago)
    assert the_one(live.clock, here).status == "fail"


# -- the whole of it --------------------------------------------------------------------------------------------


def another_model(folder: Path) -> Path:
    """The embedded one, but for a weight's last bit."""
    copy = folder / "trained"
    shutil.copytree(EMBEDDED, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1
    weights.write_bytes(data)
    return copy


def nanogpt(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("NANOGPT_")}
    return subprocess.run(
        [str(BIN / "python"), "-m", "nanogpt", *words],
        env={**keep, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_checklist_is_ticked_when_its_work_is_done(
    server: Server, behind: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a fresh server with four open boxes to eight ticks, by what the guide asks for: each has its evidence."""
    url = behind(server.url, PASSES)
    (tmp_path / "key").write_text(API_KEY + "\n")
    (tmp_path / "admin-key").write_text(ADMIN_KEY + "\n")
    keys = ("--api-key-file", str(tmp_path / "key"), "--admin-key-file", str(tmp_path / "admin-key"))
    first = nanogpt("doctor", "--checklist", "--url", url, *keys)
    assert first.returncode == 1, first.stderr
    assert "[ ] 3 The settings are made" in first.stdout  # the embedded model
    assert "[ ] 4 Logs and monitoring are set up" in first.stdout  # nobody scrapes
    assert "[x] 5 A reverse proxy is configured" in first.stdout, first.stdout
    assert "[x] 6 Security measures are taken" in first.stdout
    assert "[ ] 7 A load test was run" in first.stdout
    assert "[ ] 8 A rollback is prepared" in first.stdout
    assert API_KEY not in first.stdout + first.stderr
    assert ADMIN_KEY not in first.stdout + first.stderr

    assert nanogpt("reload", str(another_model(tmp_path)), "--url", url, ADMIN_KEY=ADMIN_KEY).returncode == 0
    headers = {"X-API-Key": API_KEY}
    body = {"prompt": "To be", "max_length": 300, "cache": False}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: server.generate({**body, "seed": seed}, headers=headers), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    for _ in range(10):
        assert server.get("/metrics", headers=headers).status_code == 200
    assert cli.main(["doctor", "--checklist", "--json", "--url", url, *keys]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [box["ticked"] for box in report["checklist"]] == [True] * 8, report
    assert report["counts"]["fail"] == report["counts"]["warn"] == 0
    assert cli.main(["doctor", "--url", url, *keys]) == 0
    out = capsys.readouterr().out
    assert "default stands by: nanogpt rollback is a switch" in out
    assert API_KEY not in out


def test_a_server_that_is_there_already_is_known_from_a_stranger_at_its_port(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    done = nanogpt("doctor", "--port", port)
    assert "A nano-gpt-api server listens at 127.0.0.1:" in done.stdout
    assert f"--url {server.url}" in done.stdout


# -- Redis ------------------------------------------------------------------------------------------------------


def test_a_redis_that_forgets_or_is_gone_is_told(tmp_path: Path) -> None:
    def look(url: str) -> Finding:
        machine = Machine(2, 10**10, 65_536, True, 1.8e9, Gpu(problem="none"))
        findings = list(configuration.redis.run(Here(Settings(redis_url=url), machine)))
        return next((finding for finding in findings if finding.status != "ok"), findings[0])

    import redis as client

    redis = RedisServer(tmp_path)
    try:
        assert look(redis.url).status == "ok"
        with client.Redis.from_url(redis.url) as link:
            link.config_set("requirepass", "s3cret")
        url = redis.url.replace("redis://", "redis://:s3cret@")
        assert look(url).status == "ok"
        refused = look(redis.url)
        assert (refused.status, "s3cret" in str(refused)) == ("fail", False)
        with client.Redis.from_url(url) as link:
            link.config_set("maxmemory-policy", "allkeys-lru")
        evicts = look(url)
        assert (evicts.status, "allkeys-lru" in evicts.says) == ("warn", True)
        assert "noeviction" in evicts.remedy
    finally:
        redis.stop()
    gone = look(url)
    assert (gone.status, "does not answer" in gone.says) == ("fail", True)
    assert "s3cret" not in str(gone)
