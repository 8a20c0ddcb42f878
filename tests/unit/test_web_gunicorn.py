"""What the server says when it starts, and what it makes of gunicorn's settings."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt.engine.client import EngineStatus
from nanogpt.settings import Settings
from nanogpt.web import gunicorn_hooks, process
from nanogpt.web.greeting import greeting

CARD = {"family": "nanogpt", "parameters": 124_439_808, "block_size": 1024, "tokenizer": "gpt2"}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make these the settings of the process; taken back after the test."""
    return lambda **values: monkeypatch.setattr(process, "settings", Settings(**values))


def arbiter(*addresses: Any) -> Any:
    return SimpleNamespace(LISTENERS=[SimpleNamespace(getsockname=lambda a=a: a) for a in addresses])


@pytest.mark.parametrize(
    ("address", "api_key", "warns"),
    [
        (("0.0.0.0", 5000), "", True),
        (("192.168.1.5", 5000), "", True),
        (("::", 5000, 0, 0), "", True),
        (("0.0.0.0", 5000), "k", False),
        (("127.0.0.1", 5000), "", False),
        (("127.0.1.1", 5000), "", False),
        (("::1", 5000, 0, 0), "", False),
        ("/run/nanogpt.sock", "", False),
    ],
)
def test_a_server_that_strangers_reach_without_a_key_says_so(
    served: Any, caplog: pytest.LogCaptureFixture, address: Any, api_key: str, warns: bool
) -> None:
    served(api_key=api_key)
    with caplog.at_level(logging.INFO):
        gunicorn_hooks.when_ready(arbiter(address))
    gc.unfreeze()  # this process goes on: what it has imported is not for good
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert bool(warnings) == warns
    assert "whoever has the admin key: no route" in caplog.text
    assert ("Open to everybody: GET /, GET /docs, GET /health" in caplog.text) == bool(api_key)
    assert ("POST /generate" in caplog.text.split("Open to everybody")[1].split("\n")[0]) == (not api_key)
    assert all("API_KEY is not set" in warning for warning in warnings)


def test_the_greeting_names_model_place_and_price_of_entry() -> None:
    status = EngineStatus(
        state="ready", model="model_40000", device="cpu", runner="native", precision="int8", card=CARD
    )
    lines = list(greeting(Settings(), [status], ["http://0.0.0.0:5000"]))
    assert lines[0] == (
        "Serving model_40000 (nanogpt, 124.4M parameters, context 1024, tokenizer gpt2) on cpu, native runner, int8."
    )
    assert lines[1] == "Open at http://0.0.0.0:5000 to everybody who reaches it (API_KEY is not set)."
    assert lines[2].startswith("Try: curl http://localhost:5000/generate ")
    locked = list(greeting(Settings(api_key="k3y"), [status], ["http://127.0.0.1:5000"]))
    assert "to those who have the API key" in locked[1]
    assert "X-API-Key" in locked[2]
    assert "k3y" not in "".join(locked)
    by_file = list(greeting(Settings(keys_file="keys.json"), [status], ["http://127.0.0.1:5000"]))
    assert "to those who have the API key" in by_file[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "Rate limit: 10 per minute for each client on the generating routes, counted on this host."),
        (
            {"redis_url": "redis://cache"},
            "Rate limit: 10 per minute for each client on the generating routes, counted over",
        ),
        ({"rate_limit": "off"}, "Rate limit: none (RATE_LIMIT is off)."),
    ],
)
def test_the_greeting_says_what_is_limited(settings: dict[str, str], says: str) -> None:
    assert any(line.startswith(says) for line in greeting(Settings(**settings), [EngineStatus()], ["http://[::1]:80"]))


def test_a_model_that_takes_long_to_load_is_announced() -> None:
    lines = list(greeting(Settings(model_checkpoint="log/"), [EngineStatus()], ["http://127.0.0.1:5000"]))
    assert lines[0] == "Loading log/; http://127.0.0.1:5000/ready says when it is served."


def test_gunicorns_own_variable_for_workers_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    assert "workers" not in gunicorn_hooks.configuration(Settings())
    assert gunicorn_hooks.configuration(Settings(http_workers=2))["workers"] == 2


@pytest.mark.parametrize(("host", "bind"), [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80")])
def test_the_address_to_listen_at(host: str, bind: str) -> None:
    assert gunicorn_hooks.configuration(Settings(host=host, port=80))["bind"] == bind


def test_a_reload_takes_what_it_can_and_names_the_rest(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    served(api_key="old", max_queue=5)
    settings = gunicorn_hooks.load_settings(lambda: Settings(api_key="new", max_queue=6))
    assert (settings.api_key, settings.max_queue) == ("new", 5)
    assert "max_queue" in caplog.text
    assert "api_key" not in caplog.text
    assert process.settings == settings


def test_the_reloadable_settings_exist() -> None:
    """A typing mistake in the list would freeze a setting silently."""
    assert gunicorn_hooks._RELOADABLE.issubset(Settings.__dataclass_fields__)
