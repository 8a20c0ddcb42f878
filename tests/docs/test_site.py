"""Protects readers of the site: it builds, each link and anchor in it leads somewhere, it needs nobody else, and it can
be searched in both languages and read on a phone."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from browser_support import chromium
from support import ROOT

PHONE = {"width": 390, "height": 844}


class Links(HTMLParser):
    """What a page refers to, what the browser loads with it, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        for name in ("href", "src"):
            if name in values:
                (self.links if tag == "a" else self.loaded).append(values[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make site` builds it: a link of a page that leads nowhere is an error there already."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "TMPDIR": str(folder)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = partial(QuietHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_every_link_and_anchor_leads_somewhere_and_nothing_comes_from_elsewhere(site: Path) -> None:
    pages = {page: Links(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert len(pages) > 20
    wrong = []
    for page, found in pages.items():
        if page.name == "404.html":  # shown at any address, so its links begin at the site's root
            continue
        for link in found.links + found.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in found.loaded:
                    wrong.append(f"{page.name} loads {link}")
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            anchors = pages[target].anchors if target in pages else {""}
            if not target.exists() or (target in pages and unquote(parts.fragment) not in anchors):
                wrong.append(f"{page.relative_to(site)}: {link}")
    assert not wrong


def test_every_page_has_its_language_and_a_way_to_the_other(site: Path) -> None:
    for page in set(site.rglob("*.html")) - {site / "404.html"}:
        text = page.read_text(encoding="utf-8")
        language = "zh" if page.parent.name == "zh" else "en"
        assert f'<html lang="{language}"' in text, page
        assert 'hreflang="zh"' in text, page
    assert 'href="../deployment.html" hreflang="en"' in (site / "zh/deployment.html").read_text(encoding="utf-8")


@pytest.mark.services
def test_in_a_browser_it_is_searched_in_both_languages_and_fits_a_phone(site: Path, address: str) -> None:
    """Every page, the tables included, is as wide as the phone; without scripts, which is quicker and no easier.
    Nothing is asked of any other host."""
    with chromium() as browser:
        page = browser.new_context(viewport=PHONE, java_script_enabled=False).new_page()
        for file in sorted(site.rglob("*.html")):
            page.goto(f"{address}/{file.relative_to(site)}")
            width = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
            assert width <= PHONE["width"], f"{file.name} is {width} pixels wide"
        page = browser.new_page(viewport=PHONE)
        asked: list[str] = []
        missing: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("response", lambda response: missing.append(response.url) if response.status >= 400 else None)
        for word, wanted in (("rollback", "deployment.html"), ("回滚", "zh/deployment.html")):
            page.goto(f"{address}/index.html?q={word}")
            found = page.locator(f".md-search-result__link[href*='{wanted}']").first
            found.wait_for(state="attached", timeout=60_000)
        assert not missing
        assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {urlsplit(address).netloc}
