"""A replica without Ray: the app's answers as they come, clients that leave, another checkpoint by configuration."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nanogpt.deploy.affinity import PREFIX_CHARS, affinity_key
from nanogpt.deploy.exchange import Head, Request
from nanogpt.deploy.metrics_page import merge
from nanogpt.deploy.replica import Replica, replica_settings
from nanogpt.deploy.wsgi_call import AppFailed, call, make_environ
from nanogpt.engine import launch
from nanogpt.errors import EngineUnhealthy, NanoGPTError, SettingsError
from nanogpt.web.connection import make_client_gone


def request(path: str = "/generate", body: Any = None, method: str = "POST", **headers: str) -> Request:
    data = b"" if body is None else json.dumps(body).encode()
    told = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    return Request(method, path, "", tuple((name.replace("_", "-"), value) for name, value in told.items()), data)


@pytest.fixture(scope="module", autouse=True)
def process_of_its_own() -> Iterator[None]:
    """A replica's supervisor is that of its whole process; here other tests' clients follow, with servers of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_started", None)
        yield


@pytest.fixture(scope="module")
def replica(process_of_its_own: None) -> Iterator[Replica]:
    replica = Replica(replica_settings({"rate_limit": "off", "context_overflow": "crop"}, 1), "r1")
    yield replica
    replica.__del__()


def ask(replica: Replica, wanted: Request) -> tuple[Head, bytes]:
    return asyncio.run(replica.answer_whole(wanted))


def test_a_replica_answers_as_the_app_does(replica: Replica) -> None:
    head, body = ask(replica, request(body={"prompt": "To be", "max_length": 4, "temperature": 0}))
    assert (head.status, head.header("x-replica")) == (200, "r1")
    assert json.loads(body)["tokens_generated"] == 4
    head, body = ask(replica, request(body={"prompt": ""}))
    assert (head.status, json.loads(body)["code"]) == (400, "invalid_request")
    replica.check_health()


def test_a_reader_that_leaves_ends_the_text(replica: Replica) -> None:
    async def look_and_leave() -> None:
        wanted = request(body={"prompt": "To be", "max_length": 500, "stream": True, "cache": False})
        async with aclosing(replica.answer(wanted)) as parts:
            assert isinstance(head := await anext(parts), Head)
            assert head.is_stream
            assert (await anext(parts)).startswith(b"data: ")  # type: ignore[union-attr]

    def num_left() -> float:
        """Of this process, which may have run other apps before."""
        page = ask(replica, request("/metrics", method="GET"))[1].decode()
        found = re.search(r'^nanogpt_request_errors_total\{code="client_closed_request"\} (\S+)', page, re.M)
        return float(found[1]) if found else 0.0

    before = num_left()
    asyncio.run(look_and_leave())
    while num_left() == before:  # pytest's timeout ends it
        pass


def test_another_checkpoint_by_configuration(replica: Replica, tmp_path: Path, caplog: Any) -> None:
    """What is refused is logged, and the model before serves on; what cannot be meant is an error."""
    with caplog.at_level(logging.ERROR, "nanogpt.deploy.replica"):
        asyncio.run(replica.reconfigure({"checkpoint": str(tmp_path / "nowhere.pt")}))
    assert "the model before serves on" in caplog.text
    replica.check_health()
    digest = json.loads(ask(replica, request("/model_info", method="GET"))[1])
    asyncio.run(replica.reconfigure({"checkpoint": "nanogpt/assets/default"}))
    replica.check_health()
    assert json.loads(ask(replica, request("/model_info", method="GET"))[1])["name"] == digest["name"]
    for config in ({"checkpiont": "log/"}, {"checkpoint": "log/", "loss_gate": {"text": "val.txt"}}):
        with pytest.raises(SettingsError):
            asyncio.run(replica.reconfigure(config))


def test_a_replica_that_cannot_serve_says_why(tmp_path: Path) -> None:
    with pytest.raises(NanoGPTError, match="nowhere") as caught:
        Replica(replica_settings({"model_checkpoint": str(tmp_path / "nowhere.pt")}, 1), "r2")
    assert isinstance(caught.value, EngineUnhealthy)


def test_a_replica_has_no_admin_routes_and_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """/admin would change the model of one replica, and a shared run directory would make two servers fight for it."""
    monkeypatch.setenv("ADMIN_KEY", "secret")
    monkeypatch.setenv("NANOGPT_RUN_DIR", "/run/nanogpt")
    settings = replica_settings({}, 3)
    assert (settings.admin_key, settings.run_dir, settings.threads) == ("", "", 3)
    assert replica_settings({"threads": 2}, 3).threads == 2
    with pytest.raises(SettingsError, match="model_chekpoint"):
        replica_settings({"model_chekpoint": "log/"}, 1)


# -- the call of a WSGI app ---------------------------------------------------------------------------------------


def collect(app: Any) -> list[Head | bytes]:
    async def run() -> list[Head | bytes]:
        with ThreadPoolExecutor(1) as threads:
            return [part async for part in call(app, request(), threads)]

    return asyncio.run(run())


def test_pieces_are_there_before_the_app_goes_on() -> None:
    """A stream is not held back: the app's second piece waits for the reader to have its first."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        read = asyncio.Event()

        def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            start("200 OK", [("A", "b")])
            yield b"first"
            asyncio.run_coroutine_threadsafe(read.wait(), loop).result(30)
            yield b"second"

        with ThreadPoolExecutor(1) as threads:
            parts = call(app, request(), threads)
            assert [await anext(parts), await anext(parts)] == [Head(200, (("A", "b"),)), b"first"]
            read.set()
            assert [part async for part in parts] == [b"second"]

    asyncio.run(run())


def test_an_app_that_fails_is_no_silent_end() -> None:
    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        start("200 OK", [])
        yield b"a"
        raise RuntimeError("boom")

    with pytest.raises(AppFailed):
        collect(app)


def test_the_environ_is_that_of_pep_3333() -> None:
    wanted = Request(
        "GET",
        "/api/caf\u00e9",
        "a=1",
        (("x-a", "1"), ("x-a", "2"), ("x_forwarded_for", "9.9.9.9"), ("content-type", "text/plain")),
        client="10.0.0.1",
        prefix="/api",
    )
    environ = make_environ(wanted, lambda: True)
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("/api", "/caf\u00e9".encode().decode("latin-1"))
    assert (environ["HTTP_X_A"], environ["CONTENT_TYPE"], environ["REMOTE_ADDR"]) == ("1,2", "text/plain", "10.0.0.1")
    # A client's X_Forwarded_For would pass for the proxy's X-Forwarded-For.
    assert "HTTP_X_FORWARDED_FOR" not in environ
    assert make_client_gone(environ)()


# -- small parts ---------------------------------------------------------------------------------------------------


def test_requests_that_begin_alike_have_one_key() -> None:
    long = "x" * PREFIX_CHARS
    key = affinity_key(request(body={"prompt": long + "a"}))
    assert (
        key
        == affinity_key(request(body={"prompt": long + "b", "seed": 1}))
        == affinity_key(request("/v1/completions", {"prompt": [long, "other"]}))
    )
    assert key != affinity_key(request(body={"prompt": "y" + long}))
    say = {"role": "system", "content": long}
    assert affinity_key(request(body={"messages": [say, {"role": "user", "content": "a"}]})) == affinity_key(
        request(body={"messages": [say, {"role": "user", "content": "b"}]})
    )
    session = affinity_key(request(body={"prompt": "a"}, x_session_id="7"))
    assert session == affinity_key(request(body={"prompt": "b"}, x_session_id="7")) != ""
    assert long not in key


@pytest.mark.parametrize("body", [b"", b"[" * 100_000, b"[]", b'{"prompt": 1}', b'{"messages": 1}', b"\xff"])
def test_a_body_that_is_no_good_has_no_key_and_is_no_error(body: bytes) -> None:
    assert affinity_key(Request("POST", "/generate", "", (), body)) in ("", affinity_key(request(body={"messages": 1})))


def test_the_pages_of_replicas_are_one_page() -> None:
    page = '# HELP a_total As.\n# TYPE a_total counter\na_total{code="x y"} 1.0\n# HELP b B.\n# TYPE b gauge\nb 2.0\n'
    assert merge([("r2", page), ("r1", page)]).splitlines() == [
        "# HELP a_total As.", "# TYPE a_total counter",
        'a_total{replica="r1",code="x y"} 1.0', 'a_total{replica="r2",code="x y"} 1.0',
        "# HELP b B.", "# TYPE b gauge", 'b{replica="r1"} 2.0', 'b{replica="r2"} 2.0',
    ]  # fmt: skip
