"""deploy/nginx and the guide's own block in a real nginx, in front of a real server.

What is about time (a stream passes as it comes) is asked of a server whose engine the test plays itself: the client has
read a token before the test lets the next one happen.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from http_support import BIN, ENDLESS, ENDLESS_BODY, START_S, Server, from_address, read_events, running, wait_for
from nginx_support import MAIN, Nginx, certificate, free_port, guide_block
from support import ROOT
from web_support import EchoClient, make_app
from werkzeug.serving import WSGIRequestHandler, make_server

from nanogpt.engine.messages import Tokens

pytestmark = pytest.mark.services

SITE, TLS = "nano-gpt-api.conf", "nano-gpt-api-tls.conf"
WITHOUT_HTTP2 = {" ssl http2;": " ssl;"}
BODY = {"prompt": "To be", "max_length": 1, "seed": 1}


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """Start nginx: ``nginx(site, server_url)``."""
    with ExitStack() as stack:

        def start(site: str, server_url: str, **changes: Any) -> Nginx:
            folder = tmp_path / f"nginx{len(list(tmp_path.glob('nginx*')))}"
            folder.mkdir()
            started = Nginx(folder, site, server_url, **changes)
            stack.callback(lambda: print(started.log.read_text()))  # shown when the test failed
            stack.callback(started.end)
            return started

        yield start


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that expects one proxy in front of it. Its port stays, so that it can be started again."""
    with serve(tmp_path_factory.mktemp("behind"), free_port()) as server:
        yield server


@contextmanager
def serve(folder: Path, port: int) -> Iterator[Server]:
    settings = {"NANOGPT_TRUSTED_PROXIES": "1", "RATE_LIMIT": "3 per minute", "ADMIN_KEY": "admin", **ENDLESS}
    with running([str(BIN / "gunicorn"), "-b", f"127.0.0.1:{port}", "web.serve:app"], folder, settings, ROOT) as server:
        yield server


@pytest.fixture(scope="module")
def site(behind: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    started = Nginx(tmp_path_factory.mktemp("site"), SITE, behind.url)
    yield started
    started.end()


_addresses = iter(f"127.0.7.{number}" for number in range(1, 255))


@pytest.fixture
def client() -> Iterator[requests.Session]:
    """A client with an address, and so with a limit, of its own."""
    with from_address(next(_addresses)) as session:
        yield session


# -- streams ----------------------------------------------------------------------------------------------------


@contextmanager
def played() -> Iterator[tuple[str, EchoClient]]:
    """A server over HTTP/1.1 whose engine says what the test tells it to, and when."""
    engine = EchoClient()
    engine.hold = True
    handler = type("Handler", (WSGIRequestHandler,), {"protocol_version": "HTTP/1.1", "log": lambda *_: None})
    server = make_server("127.0.0.1", 0, make_app(engine), threaded=True, request_handler=handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}", engine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("conf", "changes", "version"),
    [("guide", {}, "1.1"), (SITE, {}, "1.1"), (TLS, WITHOUT_HTTP2, "1.1"), (TLS, {}, "2")],
    ids=["guide", "site", "tls", "tls-http2"],
)
def test_tokens_pass_one_by_one(nginx: Callable[..., Nginx], conf: str, changes: dict[str, str], version: str) -> None:
    """Each event is read while the engine waits for the test to go on: no proxy holds it back."""
    with played() as (url, engine):
        proxy = nginx(conf, url, changes=changes)
        address = proxy.tls_url if conf == TLS else proxy.url
        command = ["curl", "-sS", "-N", "-D", str(proxy.folder / "headers"), f"{address}/generate"]
        command += ["-H", "Content-Type: application/json", "-H", "Accept-Encoding: gzip"]
        command += ["-d", json.dumps({"prompt": "abc", "max_length": 9, "stream": True})]
        command += ["--cacert", proxy.ca] if conf == TLS else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl, ExitStack() as stack:
            stack.callback(curl.kill)
            assert curl.stdout is not None
            [generation] = wait_for(lambda: engine.generations, START_S, "the request arrives")
            for token_id in generation.request.prompt_token_ids:
                generation.events.put(Tokens([token_id], None))
                assert json.loads(curl.stdout.readline().removeprefix("data: "))["text"]
                assert curl.stdout.readline() == "\n"
            generation.finish("length", 3)
            assert json.loads(curl.stdout.read().removeprefix("data: "))["generated_text"] == "abcabc"
            assert curl.wait(30) == 0
        headers = (proxy.folder / "headers").read_text()
        assert headers.startswith(f"HTTP/{version} 200")
        assert "content-type: text/event-stream" in headers.lower()
        assert "content-encoding" not in headers.lower()


def test_a_client_that_leaves_frees_its_place(behind: Server, site: Nginx, client: requests.Session) -> None:
    """Through the proxy, too: its text would go on for ever."""
    body = {**ENDLESS_BODY, "stream": True}
    with behind.engine() as engine, client.post(f"{site.url}/generate", json=body, stream=True, timeout=60) as answer:
        events = read_events(answer)
        assert next(events)[1]["text"]
        wait_for(lambda: engine.state().num_running == 1, START_S, "it runs")
        answer.raw._connection.sock.close()
        answer.close()
        wait_for(lambda: engine.state().num_running == 0, START_S, "its sequence is aborted")


# -- clients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conf", ["guide", SITE])
def test_limits_are_the_real_clients_own(behind: Server, nginx: Callable[..., Nginx], conf: str) -> None:
    """Every client has its own three a minute, and inventing addresses wins nobody a fourth.

    With the guide's block, which passes a forged X-Forwarded-For on, such requests count as the proxy's own.
    """
    proxy = nginx(conf, behind.url)

    def ask(address: str, **headers: str) -> int:
        with from_address(address) as session:
            return session.post(f"{proxy.url}/generate", json=BODY, headers=headers, timeout=60).status_code

    first, second, forger = (next(_addresses) for _ in range(3))
    assert [ask(first) for _ in range(4)] == [200, 200, 200, 429]
    assert [ask(second) for _ in range(4)] == [200, 200, 200, 429]
    assert [ask(forger) for _ in range(3)] == [200] * 3
    forged = [
        {"X-Forwarded-For": f"6.6.6.{n}", "X-Real-IP": f"6.6.7.{n}", "Forwarded": "for=6.6.8.1"} for n in range(5)
    ]
    won = [ask(forger, **headers) for headers in forged]
    assert won == ([200] * 3 + [429] * 2 if conf == "guide" else [429] * 5)
    assert ask(first, **{"X-Forwarded-For": second}) == 429


def test_a_client_has_so_many_connections(nginx: Callable[..., Nginx]) -> None:
    """Of one address, and one more is told so in our words; another client is served."""
    with played() as (url, engine):
        proxy = nginx(SITE, url, changes={"limit_conn nano_clients 64;": "limit_conn nano_clients 2;"})
        first, second = next(_addresses), next(_addresses)
        body = {"prompt": "abc", "max_length": 9}

        def ask(address: str) -> requests.Response:
            with from_address(address) as session:
                return session.post(f"{proxy.url}/generate", json=body, timeout=60)

        with ThreadPoolExecutor() as pool:
            held = [pool.submit(ask, first) for _ in range(2)]
            wait_for(lambda: len(engine.generations) == 2, START_S, "two are open")
            refused = ask(first)
            held.append(pool.submit(ask, second))
            wait_for(lambda: len(engine.generations) == 3, START_S, "another client is served")
            for generation in engine.generations:
                generation.finish("length", 0)
        assert refused.status_code == 429
        assert refused.json()["code"] == "concurrency_limit"
        assert refused.headers["Retry-After"] == "1"
        assert [answer.result().status_code for answer in held] == [200] * 3


def test_an_ipv6_client_is_its_network(nginx: Callable[..., Nginx]) -> None:
    """The map that cuts an address to 64 bits is used, and leaves IPv4 addresses as they are."""
    shown = {"add_header X-Request-Id $nano_request_id always;": "add_header X-Client $nano_client always;"}
    with played() as (url, _):
        proxy = nginx(SITE, url, changes={**shown, "# listen [::]:80;": f"listen [::1]:{(port := free_port())};"})
        with urllib.request.urlopen(f"http://[::1]:{port}/health", timeout=30) as answer:
            assert answer.headers["X-Client"].encode("latin-1") == bytes(8)
        assert requests.get(f"{proxy.url}/health", timeout=30).headers["X-Client"] == "\x7f\0\0\1"


# -- refusals ---------------------------------------------------------------------------------------------------


def test_too_large_a_body_is_refused_as_the_server_would(behind: Server, site: Nginx, client: requests.Session) -> None:
    """By nginx, which has not read it, in the shape of the route; also when its length is not announced."""
    large = json.dumps({"prompt": "x" * (1 << 20)}).encode()
    with from_address(next(_addresses)) as direct:
        ours = direct.post(f"{behind.url}/generate", data=large, timeout=30)
    for data in (large, iter([large])):
        answer = client.post(f"{site.url}/generate", data=data, timeout=30)
        assert answer.status_code == ours.status_code == 413
        assert answer.headers["Content-Type"] == ours.headers["Content-Type"] == "application/json"
        assert answer.json().keys() == ours.json().keys()
        assert answer.json()["code"] == ours.json()["code"]
        assert answer.json()["request_id"] == answer.headers["X-Request-Id"]
    openai = client.post(f"{site.url}/v1/completions", data=large, timeout=30).json()["error"]
    assert openai.keys() == {"message", "type", "param", "code"}
    assert (openai["type"], openai["code"]) == ("invalid_request_error", "payload_too_large")
    exactly = json.dumps({"prompt": ""}).encode().ljust(1 << 20)
    assert client.post(f"{site.url}/generate", data=exactly, timeout=30).status_code == 415  # the server's own word


@pytest.mark.parametrize(
    "path",
    [
        *("/metrics", "//metrics", "/./metrics", "/x/../metrics", "/%6detrics", "/metrics?x=1"),
        *("/admin", "/admin/models", "//admin//models", "/%61dmin/models", "/admin%2Fmodels", "/x/%2e%2e/admin/models"),
    ],
)
def test_what_is_not_for_the_internet_is_not_there(site: Nginx, path: str) -> None:
    """However it is spelled, and with the right key."""
    told = subprocess.run(
        ["curl", "-sS", "--path-as-is", "-w", "%{http_code}", "-H", "Authorization: Bearer admin", site.url + path],
        capture_output=True, text=True, check=True, timeout=30,
    ).stdout  # fmt: skip
    body, status = told[:-3], told[-3:]
    assert status == "404"
    assert json.loads(body)["code"] == "not_found"


def test_they_are_there_without_the_proxy(behind: Server) -> None:
    assert behind.get("/metrics").status_code == 200
    assert behind.get("/admin/models", headers={"Authorization": "Bearer admin"}).status_code == 200


@pytest.mark.parametrize("given", ["abc-1", "", "no good\tid", "x" * 129])
def test_one_id_is_in_both_logs(behind: Server, site: Nginx, client: requests.Session, given: str) -> None:
    """The client's where it is a plain token, otherwise one of nginx's own; it comes back once."""
    answer = client.post(f"{site.url}/generate", json={"prompt": 1}, headers={"X-Request-Id": given}, timeout=30)
    assert answer.status_code == 400
    [told] = answer.raw.headers.getlist("X-Request-Id")
    assert told == answer.json()["request_id"]
    assert told == given or (given != "abc-1" and re.fullmatch("[0-9a-f]{32}", told))
    assert f" id={told}" in behind.log
    wait_for(lambda: f" id={told}\n" in (site.folder / "access.log").read_text(), START_S, "nginx logs it")


def test_query_strings_are_not_logged(site: Nginx, client: requests.Session) -> None:
    marker = {"X-Request-Id": "a-query"}
    client.get(f"{site.url}/health?prompt=secret", headers=marker, timeout=30)
    line = wait_for(
        lambda: next((x for x in (site.folder / "access.log").read_text().splitlines() if "id=a-query" in x), ""),
        START_S,
        "it is logged",
    )
    assert '"GET /health HTTP/1.1" 200' in line
    assert "secret" not in line


def test_a_dead_engine_is_told_in_the_servers_own_words(behind: Server, site: Nginx, client: requests.Session) -> None:
    """A refusal of the server passes as it is, and the next request is served."""
    with ThreadPoolExecutor() as pool, behind.engine() as engine:
        answer = pool.submit(client.post, f"{site.url}/generate", json=ENDLESS_BODY, timeout=60)
        wait_for(lambda: engine.state().num_running == 1, START_S, "it runs")
        os.kill(behind.pid_of("nanogpt.engine.process"), signal.SIGKILL)
        refused = answer.result()
    assert (refused.status_code, refused.json()["code"]) == (503, "engine_died")
    assert refused.headers["Retry-After"]
    wait_for(lambda: requests.get(f"{site.url}/ready", timeout=30).status_code == 200, START_S, "it is back")
    assert client.post(f"{site.url}/generate", json=BODY, timeout=60).status_code == 200


def test_a_server_that_is_gone_is_told_in_our_words_and_is_back_at_once(
    nginx: Callable[..., Nginx], tmp_path: Path
) -> None:
    """502 in the shape of the route. nginx does not bar the only server there is for ten seconds afterwards."""
    with played() as (url, _):
        pass
    proxy = nginx(SITE, url)
    for path in ("/generate", "/generate", "/v1/completions"):
        answer = requests.post(proxy.url + path, json=BODY, timeout=30)
        assert answer.status_code == 502
        assert answer.headers["Retry-After"] == "5"
        body = answer.json()
        assert (body["error"] if path.startswith("/v1/") else body)["code"] == "bad_gateway"
    server = make_server("127.0.0.1", int(url.rpartition(":")[2]), make_app())
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    try:
        assert requests.get(f"{proxy.url}/health", timeout=30).status_code == 200
    finally:
        thread.join()
        server.server_close()


def test_a_server_that_takes_too_long_is_told_in_our_words(nginx: Callable[..., Nginx]) -> None:
    with played() as (url, engine):
        proxy = nginx(SITE, url, changes={"proxy_read_timeout 330s;": "proxy_read_timeout 200ms;"})
        answer = requests.post(f"{proxy.url}/generate", json={"prompt": "abc"}, timeout=30)
        assert (answer.status_code, answer.json()["code"]) == (504, "gateway_timeout")
        for generation in engine.generations:
            generation.finish("length", 0)


# -- TLS --------------------------------------------------------------------------------------------------------


def test_tls_is_modern(nginx: Callable[..., Nginx]) -> None:
    """HSTS on every answer, no old protocol, and plain HTTP leads to it without losing a POST."""
    with played() as (url, _):
        proxy = nginx(TLS, url)
        for path, status in (("/health", 200), ("/metrics", 404), ("/nowhere", 404)):
            answer = requests.get(proxy.tls_url + path, verify=proxy.ca, timeout=30)
            assert answer.status_code == status
            assert answer.headers["Strict-Transport-Security"] == "max-age=63072000"
        moved = requests.post(f"{proxy.url}/generate?x=1", json=BODY, allow_redirects=False, timeout=30)
        assert moved.status_code == 308
        assert moved.headers["Location"] == "https://127.0.0.1/generate?x=1"
        assert "Strict-Transport-Security" not in moved.headers
        for version, taken in (("1.1", False), ("1.2", True), ("1.3", True)):
            command = ["curl", "-sS", "--cacert", proxy.ca, f"--tlsv{version}", "--tls-max", version]
            command += ["--ciphers", "DEFAULT:@SECLEVEL=0", f"{proxy.tls_url}/health"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=30)
            assert (result.returncode == 0) == taken
            assert ("alert protocol version" in result.stderr) != taken  # the server refused, and not curl


@pytest.mark.parametrize("conf", ["guide", SITE, TLS])
def test_nginx_accepts_it_without_a_word(nginx: Callable[..., Nginx], conf: str) -> None:
    proxy = nginx(conf, "http://127.0.0.1:9")
    result = subprocess.run(proxy.command("-t"), cwd=proxy.folder, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0
    assert "[" not in result.stderr, result.stderr


@pytest.mark.parametrize("page", ["docs/deployment.md", "docs/zh/deployment.md"])
def test_the_documented_commands_install_it(page: str, tmp_path: Path) -> None:
    """Word for word, but for the folder; what they leave is a configuration that nginx takes."""
    found = re.search(r"^```bash\n(cp -r deploy/nginx/.*?)^nginx -t ", (ROOT / page).read_text("utf-8"), re.M | re.S)
    assert found
    etc = tmp_path / "etc"
    (etc / "conf.d").mkdir(parents=True)
    subprocess.run(["sh", "-e", "-c", found[1].replace("/etc/nginx", str(etc))], cwd=ROOT, check=True, timeout=30)
    installed = etc / "conf.d" / "nano-gpt-api.conf"
    assert "your-domain.com" not in installed.read_text()
    live = "/etc/letsencrypt/live/gpt.example.com"
    assert installed.read_text().count(live) == 2
    certificate(tmp_path)
    installed.write_text(installed.read_text().replace(live, str(tmp_path)))
    server = etc / "nano-gpt-api" / "server.conf"
    server.write_text(server.read_text().replace("/var/log/nginx", str(tmp_path)))
    (etc / "nginx.conf").write_text(MAIN)
    command = ["nginx", "-t", "-p", str(tmp_path), "-c", str(etc / "nginx.conf"), "-e", "stderr"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr


def test_both_languages_show_the_guides_block() -> None:
    assert guide_block("docs/deployment.md") == guide_block("docs/zh/deployment.md")
