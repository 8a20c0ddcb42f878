"""Who may ask for which route: the table that a server logs at its start is tried on it, route by route."""

from __future__ import annotations

import re
from pathlib import Path

import requests
from http_support import BIN, GUNICORN, Server, wait_for
from support import ROOT

from nanogpt.keys import add_key

API_KEY = "the-default-key"
ROW = re.compile(r"Open to (everybody|whoever has a key|whoever has the admin key): (.*)\.$", re.M)


def exposed(server: Server) -> dict[str, list[tuple[str, str]]]:
    """The table in the log: who → (method, route)."""
    wait_for(lambda: len(ROW.findall(server.log)) == 3, 30.0, "the table is logged")
    return {
        who: [
            (method, re.sub(r"<(?:\w+:)?\w+>", "default", route))
            for methods, route in re.findall(r"([A-Z|]+) (/\S*?)(?:,|$)", routes)
            for method in methods.split("|")
        ]
        for who, routes in ROW.findall(server.log)
    }


def ask(server: Server, method: str, route: str, **headers: str) -> int:
    return requests.request(method, server.url + route, json={}, timeout=30, headers=headers).status_code


def test_a_closed_server(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "alice", {})
    environment = {"API_KEY": API_KEY, "NANOGPT_KEYS_FILE": str(tmp_path / "keys.json")}
    server = Server([str(BIN / GUNICORN[0]), *GUNICORN[1:]], tmp_path, environment, ROOT)
    try:
        server.wait_ready()
        table = exposed(server)
        assert {("GET", "/"), ("GET", "/health"), ("GET", "/ready")}.issubset(table["everybody"])
        opened = {"/", "/health", "/ready", "/docs", "/openapi.json", "/playground/default/default"}
        assert {route for _, route in table["everybody"]} <= opened
        assert ("POST", "/generate") in table["whoever has a key"]
        keys = [{"X-API-Key": key}, {"Authorization": f"Bearer {API_KEY}"}]
        strangers = [{}, {"X-API-Key": "wrong"}, {"X-API-Key": key[:-1]}, {"Authorization": f"Basic {key}"}]
        for method, route in table["everybody"]:
            assert 401 not in {ask(server, method, route, **headers) for headers in strangers + keys}, (method, route)
        for method, route in table["whoever has a key"]:
            assert {ask(server, method, route, **headers) for headers in strangers} == {401}, (method, route)
            assert 401 not in {ask(server, method, route, **headers) for headers in keys}, (method, route)
        for route in ("/none", "/admin/reload", "/generate/"):
            assert ask(server, "POST", route) == 401, route
            assert ask(server, "POST", route, **keys[0]) == 404, route
    finally:
        server.end()


def test_an_open_server(server: Server) -> None:
    table = exposed(server)
    assert table["whoever has a key"] == []
    assert ("POST", "/generate") in table["everybody"]
    for method, route in table["everybody"]:
        missing = () if route.startswith("/playground/") else (404,)  # there is no file of that name
        assert ask(server, method, route) not in (401, 403, *missing), (method, route)


def test_without_an_admin_key_there_are_no_admin_routes(server: Server) -> None:
    assert exposed(server)["whoever has the admin key"] == []
    assert "without an admin key /admin does not exist" in server.log
    for route in ("/admin/reload", "/admin/rollback", "/admin/models"):
        for method in ("GET", "POST"):
            assert ask(server, method, route, **{"X-API-Key": API_KEY}) == 404
