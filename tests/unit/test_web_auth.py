"""Keys: every route is closed unless it is on a short list, and neither a key nor its absence can be guessed round."""

from __future__ import annotations

import pytest
from web_support import make_app

from nanogpt.web.auth import OPEN_ROUTES

KEY = "s3cret-schlüssel-钥匙"
PROMPT = {"prompt": "a", "max_length": 1}


def status(headers: dict[str, str], key: str = KEY) -> int:
    # A client sends the key's UTF-8 bytes; WSGI hands them over as Latin-1.
    environ = {f"HTTP_{name.upper().replace('-', '_')}": v.encode().decode("latin-1") for name, v in headers.items()}
    return make_app(api_key=key).test_client().post("/generate", json=PROMPT, environ_overrides=environ).status_code


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": KEY},
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer   {KEY}"},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {KEY}"},
    ],
)
def test_the_key_opens(headers: dict[str, str]) -> None:
    assert status(headers) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": KEY[:-1]},
        {"X-API-Key": KEY + "x"},
        {"X-API-Key": KEY.upper()},
        {"Authorization": KEY},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY} {KEY}"},
    ],
)
def test_nothing_else_does(headers: dict[str, str]) -> None:
    assert status(headers) == 401


def test_the_refusal_is_the_guides() -> None:
    answer = make_app(api_key=KEY).test_client().post("/generate", json=PROMPT)
    assert answer.json["error"] == "Invalid API key"
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_without_a_key_the_server_is_open_and_an_offered_key_is_no_matter() -> None:
    assert status({}, key="") == 200
    assert status({"X-API-Key": "any"}, key="") == 200


def test_every_route_but_the_listed_ones_is_closed() -> None:
    """Also one that somebody adds later and forgets about, and those that do not exist."""
    app = make_app(api_key=KEY)
    assert sorted(OPEN_ROUTES) == ["/", "/docs", "/health", "/openapi.json", "/playground/<build>/<name>", "/ready"]

    @app.route("/added/<later>")
    def added(later: str) -> str:
        return later

    http = app.test_client()
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<later>", "x")
        for method in (rule.methods or set()) | {"OPTIONS", "DELETE"}:
            is_open = rule.rule in OPEN_ROUTES and method in ("GET", "HEAD")
            assert (http.open(path, method=method).status_code == 401) != is_open, (method, path)
    assert http.get("/no/such/route").status_code == 401
    assert http.post("/health/../generate", json=PROMPT).status_code == 401
