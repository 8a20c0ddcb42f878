"""Two checkpoints side by side on the playground, in a real Chromium at a server that has two."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from browser_support import PLACES, Visitor, check_with_axe, chromium
from http_support import BIN, ENDLESS, GUNICORN, START_S, Server, running
from playwright.sync_api import Browser
from support import ROOT, find_shared

from nanogpt.engine.client import EngineClient
from nanogpt.settings import Settings

CHECKPOINTS = (find_shared() or ROOT / "shared") / "checkpoints"
FIRST, SECOND = "01_nanogpt_char", "01b_nanogpt_char_tiny"

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("shared")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {
        "MODEL_CHECKPOINT": str(CHECKPOINTS / FIRST),
        "COMPARE_CHECKPOINT": str(CHECKPOINTS / SECOND),
        **ENDLESS,
    }
    with running(
        [str(BIN / GUNICORN[0]), *GUNICORN[1:]], tmp_path_factory.mktemp("playground"), environment, ROOT
    ) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(params=("en-desk", "zh-phone"))
def visitor(request: pytest.FixtureRequest, browser: Browser, server: Server) -> Iterator[Visitor]:
    """At the page, which has heard of both models."""
    context = browser.new_context(**PLACES[request.param], reduced_motion="reduce")
    visitor = Visitor(context.new_page(), server.url + "/")
    visitor.page.wait_for_selector("#answer-A .of:not([hidden])")
    yield visitor
    assert visitor.errors == []
    context.close()


def model(visitor: Visitor, column: str) -> Any:
    """The field in which a column's model is chosen, by the name that is read out for it."""
    answer = visitor.words["answer.of"].format(name=column)
    return visitor.page.get_by_label(visitor.words["answer.model"].format(answer=answer), exact=True)


def chosen(visitor: Visitor, column: str) -> str:
    return str(model(visitor, column).evaluate("select => select.selectedOptions[0].text"))


def wait_for_an_end(visitor: Visitor) -> None:
    for column in "AB":
        visitor.ended(column)
    visitor.page.wait_for_function("() => !document.body.classList.contains('running')")


def test_one_prompt_and_one_seed_on_two_checkpoints(visitor: Visitor, server: Server) -> None:
    """Each column stands under its model's name and holds what that model answers to the one seed, which was drawn."""
    page = visitor.page
    visitor.set(max_length=30)
    visitor.choose("compare", "checkbox")
    assert [chosen(visitor, column) for column in "AB"] == [FIRST, SECOND]
    visitor.run("ROMEO:")
    wait_for_an_end(visitor)
    seed = visitor.seed("A")
    assert visitor.seed("B") == seed
    for column, name in (("A", FIRST), ("B", SECOND)):
        answer = server.generate({"prompt": "ROMEO:", "max_length": 30, "seed": seed, "model": name}).json()
        assert answer["model"] == name
        assert visitor.text(column) == answer["generated_text"]
        heading = visitor.words["answer.of"].format(name=column)
        label = visitor.words["answer.by"].format(answer=heading, model=name)
        assert page.get_attribute(f"#answer-{column}", "aria-label") == label
    assert visitor.text("A") != visitor.text("B")
    check_with_axe(visitor)
    visitor.choose("tab.code", "tab")
    for program in ("curl", "Python", "JavaScript"):
        assert SECOND in (page.text_content(f"[data-program={program}] code") or ""), "the panel is about B"
    visitor.choose("tab.model", "tab")
    assert SECOND in page.inner_text("#card")
    page.get_by_role("radio", name="A", exact=True).click(force=True)
    assert FIRST in page.inner_text("#card")


def test_a_column_changes_its_model_by_the_keyboard(visitor: Visitor) -> None:
    """What the other one wrote goes; both can be the same, each with settings of its own."""
    visitor.set(max_length=5, seed=3)
    visitor.choose("compare", "checkbox")
    visitor.run("ROMEO:")
    wait_for_an_end(visitor)
    first = visitor.text("A")
    model(visitor, "B").focus()
    visitor.page.keyboard.press("ArrowUp")
    assert chosen(visitor, "B") == FIRST
    assert (visitor.text("A"), visitor.text("B")) == (first, "")
    visitor.run("ROMEO:")
    wait_for_an_end(visitor)
    assert visitor.text("B") == visitor.text("A") == first
    assert [body.get("model") for body in visitor.sent("generate")] == [None, SECOND, None, None]
    visitor.choose("compare", "checkbox")
    model_of_one = visitor.page.locator("#answer-A .of")
    model_of_one.select_option(label=SECOND)
    visitor.run("ROMEO:")
    visitor.ended()
    assert visitor.text() != first, "also in one column"


@pytest.mark.parametrize("visitor", ["en-desk"], indirect=True)
def test_the_death_of_one_is_told_and_the_other_writes_on(visitor: Visitor, server: Server) -> None:
    """The page is about the default model's server: that one is ready all the time."""
    page = visitor.page
    visitor.set(max_length=1_000_000)
    visitor.choose("compare", "checkbox")
    visitor.run("ROMEO:")
    written = "document.querySelectorAll('#answer-{} .token').length"
    for column in "AB":
        page.wait_for_function(f"() => {written.format(column)} > 5")
    client = EngineClient(Settings(run_dir=str(server.run_dir)), role="compare")
    try:
        pid = client.wait_ready(START_S).engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        page.wait_for_selector("#answer-B .stats[data-state=failed]")
        before = page.evaluate(written.format("A"))
        page.wait_for_function(f"before => {written.format('A')} > before", arg=before)
        page.keyboard.press("Escape")
        visitor.reads("#answer-A .stats", "end.stopped")
        visitor.reads("#notice", "notice.broken")
        visitor.reads("#served-state", "state.ready")
        assert client.wait_ready(START_S).state == "ready"
    finally:
        client.close()
    visitor.run("ROMEO:")
    page.wait_for_function(f"() => {written.format('B')} > 5")
    page.keyboard.press("Escape")
