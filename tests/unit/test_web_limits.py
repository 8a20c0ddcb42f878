"""Limits as a client meets them: what is counted, what is refused and how it is told, what a key's tokens come to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from web_support import EchoClient, make_app
from werkzeug.test import TestResponse

from nanogpt.errors import EngineDied, QueueFull, SettingsError
from nanogpt.keys import add_key
from nanogpt.web.limits import GENERATING_ROUTES

BODY = {"prompt": "ab", "max_length": 5}


def post(app: Flask, body: Any = BODY, key: str = "", **headers: str) -> TestResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()} | ({"X-API-Key": key} if key else {})
    return app.test_client().post("/generate", json=body, headers=named)


def test_the_guides_limit_is_the_default() -> None:
    app = make_app(rate_limit="10 per minute")
    answers = [post(app) for _ in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429] * 2


def test_every_answer_says_how_the_limit_stands() -> None:
    app = make_app(rate_limit="2 per minute; 3 per hour")
    first = post(app)
    assert first.headers["RateLimit-Limit"] == "2"
    assert first.headers["RateLimit-Remaining"] == "1"
    assert 58 <= int(first.headers["RateLimit-Reset"]) <= 60
    assert first.headers["RateLimit-Policy"] == "2;w=60, 3;w=3600"
    assert "Retry-After" not in first.headers
    post(app)
    refused = post(app)
    assert refused.status_code == 429
    assert refused.headers["RateLimit-Remaining"] == "0"
    assert 58 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.json["code"] == "rate_limited"
    assert refused.json["error"] == "Too many requests: 2 per minute are admitted."
    assert refused.json["remedy"] == f"Send it again in {refused.headers['Retry-After']} s."


def test_a_bad_request_is_counted_and_told_too() -> None:
    app = make_app(rate_limit="2 per minute")
    answer = post(app, {"prompt": ""})
    assert answer.status_code == 400
    assert answer.headers["RateLimit-Remaining"] == "1"


def test_a_stream_tells_it_as_well() -> None:
    answer = post(make_app(rate_limit="2 per minute"), {**BODY, "stream": True})
    assert answer.headers["RateLimit-Remaining"] == "1"


def test_a_refused_request_costs_nothing_else() -> None:
    """Its body is not even looked at."""
    client = EchoClient()
    app = make_app(client, rate_limit="1 per minute")
    post(app)
    assert app.test_client().post("/generate", data=b"{no json", content_type="text/plain").status_code == 429
    assert len(client.generations) == 1


def test_other_routes_are_not_counted() -> None:
    app = make_app(rate_limit="1 per minute")
    for _ in range(3):
        for path in ("/health", "/ready", "/"):
            answer = app.test_client().get(path)
            assert answer.status_code == 200
            assert not any(name.startswith("RateLimit") for name in answer.headers.keys())  # noqa: SIM118
        assert app.test_client().get("/generate").status_code == 405
    assert post(app).status_code == 200


def test_every_generating_route_that_there_is_is_counted() -> None:
    """One that is added under another name would go without limits."""
    app = make_app(rate_limit="1 per minute")
    rules = {rule.rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())}
    there = rules & GENERATING_ROUTES
    assert "/generate" in there
    for rule in there:
        app = make_app(rate_limit="1 per minute")
        assert app.test_client().post(rule, json={}).headers["RateLimit-Remaining"] == "0"


@pytest.mark.parametrize(
    ("proxies", "admitted"),
    [(0, 1), (1, 3)],
)
def test_a_forged_address_wins_nothing_unless_a_proxy_wrote_it(proxies: int, admitted: int) -> None:
    app = make_app(rate_limit="1 per minute", trusted_proxies=proxies)
    answers = [post(app, X_Forwarded_For=f"6.6.6.{number}").status_code for number in range(3)]
    assert answers.count(200) == admitted


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rate_limit": "some"}, "RATE_LIMIT"),
        ({"redis_url": "cache:6379"}, "REDIS_URL is not a URL of Redis"),
        ({"redis_url": "redis://user:passw0rd@cache:port/0"}, "REDIS_URL is not a URL of Redis"),
        ({"keys_file": "/no/such/file"}, "no keys file /no/such/file"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(settings: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as refused:
        make_app(**settings)
    assert "passw0rd" not in str(refused.value)


# -- keys of the file -------------------------------------------------------------------------------------------


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_keys_file_closes_the_server_and_its_keys_open_it(keys_file: Path) -> None:
    key = add_key(keys_file, "alice", {"max_concurrency": 3})
    client = EchoClient()
    app = make_app(client, keys_file=str(keys_file), api_key="the-default")
    assert post(app).status_code == 401
    assert post(app, key=key + "x").status_code == 401
    assert post(app, key=key).status_code == 200
    assert post(app, key="the-default").status_code == 200
    alice, default = (generation.request for generation in client.generations)
    assert (alice.client, alice.max_concurrency) == ("key:alice", 3)
    assert (default.client, default.max_concurrency) == ("key:default", 0)


def test_an_empty_keys_file_lets_nobody_in(keys_file: Path) -> None:
    keys_file.touch(mode=0o600)
    keys_file.write_text('{"version": 1, "keys": []}')
    app = make_app(keys_file=str(keys_file))
    assert post(app).status_code == 401
    assert post(app, key="").status_code == 401


def test_a_key_has_its_own_requests_a_minute_or_the_common_ones(keys_file: Path) -> None:
    much = add_key(keys_file, "much", {"requests_per_minute": 5})
    common = add_key(keys_file, "common", {})
    app = make_app(keys_file=str(keys_file), rate_limit="2 per minute")
    assert [post(app, key=much).status_code for _ in range(6)] == [200] * 5 + [429]
    assert [post(app, key=common).status_code for _ in range(3)] == [200] * 2 + [429]


def test_requests_without_a_key_use_up_nobodys_limit(keys_file: Path) -> None:
    key = add_key(keys_file, "alice", {})
    app = make_app(keys_file=str(keys_file), rate_limit="1 per minute")
    assert [post(app, key="wrong").status_code for _ in range(5)] == [401] * 5
    assert post(app, key=key).status_code == 200


# -- tokens a minute --------------------------------------------------------------------------------------------


class Tokens:
    """A server, and a key with 100 tokens a minute."""

    def __init__(self, keys_file: Path, client: EchoClient, **settings: Any) -> None:
        self.key = add_key(keys_file, "alice", {"tokens_per_minute": 100})
        self.client = client
        self.app = make_app(client, keys_file=str(keys_file), **settings)

    def post(self, **body: Any) -> TestResponse:
        return post(self.app, {**BODY, **body}, key=self.key)

    def left(self) -> int:
        """What a request of two tokens leaves, and its two."""
        return int(self.post(prompt="a", max_length=1).headers["X-RateLimit-Remaining-Tokens"]) + 2


@pytest.fixture
def tokens(keys_file: Path) -> Tokens:
    return Tokens(keys_file, EchoClient())


def test_prompt_and_answer_are_charged(tokens: Tokens) -> None:
    answer = tokens.post(prompt="abcd", max_length=6)
    assert answer.headers["X-RateLimit-Limit-Tokens"] == "100"
    assert answer.headers["X-RateLimit-Remaining-Tokens"] == "90"
    assert tokens.left() == 90


def test_what_was_not_generated_is_given_back(tokens: Tokens) -> None:
    """A stop text after four tokens of fifty: the prompt's eight, and the four (those of the stop text included)."""
    answer = tokens.post(prompt="abcdefgh", max_length=50, stop="cd")
    assert answer.json["usage"]["total_tokens"] == 8 + 4
    assert answer.headers["X-RateLimit-Remaining-Tokens"] == "42"
    assert tokens.left() == 100 - 8 - 4


def test_a_stream_is_settled_when_it_ends(tokens: Tokens) -> None:
    answer = tokens.post(max_length=50, prompt="abcdefgh", stop="cd", stream=True)
    assert b'"finish_reason":"stop"' in answer.data
    answer.close()
    assert tokens.left() == 100 - 8 - 4


def test_more_than_is_left_is_refused_with_the_limit_and_the_time(tokens: Tokens) -> None:
    assert tokens.post(prompt="abcdefgh", max_length=82).status_code == 200
    refused = tokens.post(prompt="abcdefgh", max_length=10)
    assert refused.status_code == 429
    assert refused.json["code"] == "tokens_limited"
    assert refused.json["error"] == (
        "Too many tokens: this key has 100 a minute, 10 are left, and the request is for up to 18, prompt and answer."
    )
    assert 58 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["X-RateLimit-Remaining-Tokens"] == "10"
    assert tokens.post(prompt="ab", max_length=8).status_code == 200, "what fits is admitted"


def test_what_never_fits_is_no_matter_of_waiting(tokens: Tokens) -> None:
    refused = tokens.post(prompt="abcdefgh", max_length=93)
    assert refused.status_code == 400
    assert refused.json["code"] == "invalid_request"
    assert "up to 101 tokens" in refused.json["error"]
    assert tokens.left() == 100


def test_the_contexts_end_bounds_what_is_taken(keys_file: Path) -> None:
    """500 new tokens cannot be written into 16: they are not held against the key."""
    client = EchoClient()
    client.status = dataclasses.replace(client.status, card={"block_size": 16})
    tokens = Tokens(keys_file, client)
    assert tokens.post(prompt="abcd", max_length=500, stop="a").headers["X-RateLimit-Remaining-Tokens"] == "83"


@pytest.mark.parametrize("error", [QueueFull("full"), EngineDied("gone")])
def test_what_the_engine_refuses_costs_no_tokens(
    tokens: Tokens, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanogpt.web.shedding._FULL_S", 0.0)
    tokens.client.refuse = error
    assert tokens.post().status_code == 503
    tokens.client.refuse = None
    assert tokens.left() == 100


def test_what_an_engine_wrote_before_it_died_is_charged(tokens: Tokens) -> None:
    tokens.client.error = "died"
    assert tokens.post(prompt="abcd", max_length=6).status_code == 503
    tokens.client.error = None
    assert tokens.left() == 90


def test_other_keys_have_no_such_limit(tokens: Tokens, keys_file: Path) -> None:
    tokens.left()
    free = add_key(keys_file, "free", {})
    app = make_app(keys_file=str(keys_file))
    answer = post(app, {"prompt": "a", "max_length": 500}, key=free)
    assert answer.status_code == 200
    assert "X-RateLimit-Limit-Tokens" not in answer.headers


def test_keys_are_not_logged(tokens: Tokens, keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    tokens.post(prompt="abcdefgh", max_length=93)
    post(tokens.app, key="ngk_wrong-but-somebodys")
    tokens.post()
    assert caplog.records
    assert tokens.key[4:] not in caplog.text
    assert "ngk_" not in caplog.text
    assert tokens.key[4:] not in repr(tokens.app.extensions["nanogpt.doorkeeper"].__dict__)
