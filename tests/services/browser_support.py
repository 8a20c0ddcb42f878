"""A real Chromium at the playground, and a visitor who knows its words in both languages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, sync_playwright
from support import require_service

WAIT_MS = 20_000  # only a test that fails ever waits so long
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage"]
DESK = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
PLACES = {
    "en-desk": {"locale": "en-GB", "viewport": DESK},
    "zh-desk": {"locale": "zh-CN", "viewport": DESK},
    "en-phone": {"locale": "en-GB", "viewport": PHONE, "has_touch": True},
    "zh-phone": {"locale": "zh-CN", "viewport": PHONE, "has_touch": True},
}


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium: Playwright's own would have to be downloaded."""
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    require_service("chromium", path is not None, "apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """Somebody at the page: presses what they read, and reads what stands there.

    ``requests``: all that the page sent. ``words``: what it says, in the visitor's language.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.requests: list[Request] = []
        self.errors: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: self.requests.append(request))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console", lambda message: self.errors.append(message.text) if "Content Security" in message.text else None
        )
        page.goto(url)
        self.words: dict[str, str] = page.evaluate(
            """async () => {
                const app = document.querySelector("script[type=module]").src;
                const { WORDS } = await import(app.replace("app.js", "words.js"));
                return WORDS[document.documentElement.lang.slice(0, 2)];
            }"""
        )

    def enter(self, key: str) -> None:
        """Type the key, and wait until the page knows the model."""
        self.page.fill("#key", key)
        self.page.press("#key", "Enter")
        self.page.wait_for_selector("#served[data-state=ready]")

    def set(self, **settings: Any) -> None:
        for name, value in settings.items():
            if not self.page.is_visible(f"#set-{name}"):
                self.page.click("#settings summary")
            self.page.fill(f"#set-{name}", str(value))
            self.page.press(f"#set-{name}", "Tab")

    def press(self, word: str) -> None:
        """The button on which the word stands."""
        self.page.get_by_role("button", name=self.words[word], exact=True).click()

    def choose(self, word: str, role: Any = "radio") -> None:
        self.page.get_by_role(role, name=self.words[word], exact=True).click(force=True)

    def run(self, prompt: str | None = None) -> None:
        if prompt is not None:
            self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Control+Enter")

    def ended(self, column: str = "A") -> None:
        """Wait for the end of an answer; the only ends are those that the server tells."""
        self.page.wait_for_selector(f"#answer-{column} .stats:is([data-state=length], [data-state=stop])")

    def text(self, column: str = "A") -> str:
        return self.page.text_content(f"#answer-{column} .text") or ""

    def stat(self, name: str, column: str = "A") -> str:
        return self.page.inner_text(f"#answer-{column} .stat-{name} dd").split("\n")[0]

    def seed(self, column: str = "A") -> int:
        found = re.match(r"\d+", self.stat("seed", column))
        assert found
        return int(found[0])

    def reads(self, selector: str, word: str) -> None:
        """Wait until the words stand there; numbers in them may be any."""
        pattern = re.sub(r"\\\{\w+\\\}", r"[\\d,.% ]+", re.escape(self.words[word]))
        self.page.locator(selector, has_text=re.compile(pattern)).first.wait_for()

    def sent(self, path: str) -> list[dict[str, Any]]:
        """The bodies that the page sent to a route, in order."""
        return [request.post_data_json for request in self.requests if request.url == self.url + path]


def check_with_axe(visitor: Visitor) -> None:
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = Axe().run(visitor.page, options={"runOnly": {"type": "tag", "values": tags}, "resultTypes": ["violations"]})
    assert found.response["violations"] == [], found.generate_report()
    width = visitor.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width[0] <= width[1], "the page scrolls sideways"
