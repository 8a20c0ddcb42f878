"""The playground as HTTP sees it: who gets the page, what it may load, how long it is kept. The page itself is driven
by a real browser in tests/services/test_playground.py."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from flask.testing import FlaskClient
from support import ROOT
from web_support import EchoClient, make_app

FOLDER = ROOT / "nanogpt" / "web" / "playground"
CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"


@pytest.fixture(scope="module")
def http() -> FlaskClient:
    return make_app().test_client()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (CHROME, "text/html"),
        ("text/html", "text/html"),
        ("*/*", "application/json"),
        (None, "application/json"),
        ("application/json", "application/json"),
        ("application/json, text/html;q=0.5", "application/json"),
        ("text/plain", "application/json"),
    ],
)
def test_browsers_get_the_page_and_programs_get_json(http: FlaskClient, accept: str | None, kind: str) -> None:
    answer = http.get("/", headers={} if accept is None else {"Accept": accept})
    assert (answer.status_code, answer.mimetype) == (200, kind)
    assert answer.headers["Vary"] == "Accept", "a cache between must not mix the two"


def page_files(http: FlaskClient) -> list[str]:
    return re.findall(r'(?:href|src)="(playground/[^"]+)"', http.get("/", headers={"Accept": CHROME}).text)


def test_the_page_is_asked_for_again_and_its_files_are_kept_for_ever(http: FlaskClient) -> None:
    answer = http.get("/", headers={"Accept": CHROME})
    assert answer.headers["Cache-Control"] == "no-cache"
    again = http.get("/", headers={"Accept": CHROME, "If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert len(page_files(http)) >= 4
    for path in page_files(http):
        file = http.get(f"/{path}")
        assert file.status_code == 200, path
        assert "immutable" in file.headers["Cache-Control"]


def test_a_file_of_another_version_is_not_kept(http: FlaskClient) -> None:
    """While servers are being replaced, a page may ask the other one. What it gets must not stay under that name."""
    assert http.get("/playground/0123456789ab/app.js").headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("name", ["none.js", "index.html", "..%2f..%2fauth.py", "../app.py", "%00", "app.js/"])
def test_there_are_no_other_files(http: FlaskClient, name: str) -> None:
    answer = http.get(f"/playground/x/{name}")
    assert answer.status_code == 404
    assert answer.json["code"] == "not_found"


def test_nothing_may_be_loaded_from_elsewhere_or_run_inline(http: FlaskClient) -> None:
    for path in ["", *page_files(http)]:
        headers = http.get(f"/{path}", headers={"Accept": CHROME}).headers
        rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
        assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert headers["X-Content-Type-Options"] == "nosniff"
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|\beval\b|innerHTML|style=\"|\son\w+=\"", text), file.name


def test_the_page_and_its_files_are_open_and_the_model_is_not() -> None:
    closed = make_app(api_key="secret").test_client()
    for path in ["", *page_files(closed)]:
        assert closed.get(f"/{path}", headers={"Accept": CHROME}).status_code == 200
    assert closed.get("/model_info").status_code == 401
    assert closed.get("/model_info", headers={"X-API-Key": "secret"}).status_code == 200


def test_the_model_is_described_without_the_hosts_paths() -> None:
    client = EchoClient()
    card = {"family": "nanogpt", "block_size": 8, "path": "/srv/secret/model.pt", "chat_template": "{{ messages }}"}
    client.status = replace(client.status, card=card, digest="ab12", precision="int8", runner="native")
    answer = make_app(client).test_client().get("/model_info")
    assert answer.json["name"] == "echo"
    assert answer.json["context"] == 8
    assert answer.json["has_chat_template"] is True
    assert (answer.json["device"], answer.json["precision"], answer.json["digest"]) == ("cpu", "int8", "ab12")
    assert "secret" not in answer.text
    assert answer.json["int8_matrices"] is None
    planned = {**card, "int8_matrices": ["transformer.wte"]}
    client.status = replace(client.status, card=planned, precision="int4")
    assert make_app(client).test_client().get("/model_info").json["int8_matrices"] == ["transformer.wte"]


def test_every_word_is_there_in_both_languages() -> None:
    english, chinese = re.split(r"\n  zh: \{\n", (FOLDER / "words.js").read_text(encoding="utf-8"))
    word = re.compile(r'^    (?:"([\w.]+)"|(\w+)): "(.*)",$', re.M)
    words = [{key or plain: text for key, plain, text in word.findall(half)} for half in (english, chinese)]
    assert words[0].keys() == words[1].keys()
    for key, text in words[0].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", words[1][key])), key
    used = "".join(file.read_text(encoding="utf-8") for file in FOLDER.iterdir() if file.name != "words.js")
    for key in re.findall(r'data-(?:word|label)="([\w.]+)"', used) + re.findall(r'\bt\("([\w.]+)"', used):
        assert key in words[0], key
