"""The playground, driven by a real Chromium against a real server: in both languages, on a desk and on a phone."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from browser_support import DESK, PHONE, PLACES, Visitor, check_with_axe, chromium
from http_support import BIN, ENDLESS, GUNICORN, START_S, Server, running, wait_for
from playwright.sync_api import Browser
from support import ROOT

from nanogpt.keys import add_key

pytestmark = pytest.mark.services

KEY = "the-key-of-the-server"
# Each message and answer in the characters that the model knows.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def limited_key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, add_key(path, "limited", {"requests_per_minute": 1})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, limited_key: tuple[Path, str]) -> Iterator[Server]:
    """Closed by keys, with a checkpoint that has a chat template, and texts that go on until somebody stops them."""
    folder = tmp_path_factory.mktemp("playground")
    model = folder / "shakespeare"
    shutil.copytree(ROOT / "nanogpt" / "assets" / "default", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    environment = {
        **ENDLESS, "MODEL_CHECKPOINT": str(model), "API_KEY": KEY, "NANOGPT_KEYS_FILE": str(limited_key[0]),
        "NANOGPT_ENGINE_WAIT_S": "0.2", "NANOGPT_MAX_PROMPT_CHARS": "777",
    }  # fmt: skip
    with running([str(BIN / GUNICORN[0]), *GUNICORN[1:]], folder, environment, ROOT) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(params=("en-desk", "zh-phone"))
def stranger(request: pytest.FixtureRequest, browser: Browser, server: Server) -> Iterator[Visitor]:
    """At the page, without a key."""
    context = browser.new_context(**PLACES[request.param], reduced_motion="reduce")
    visitor = Visitor(context.new_page(), server.url + "/")
    yield visitor
    assert visitor.errors == []
    assert {url.url for url in visitor.requests if not url.url.startswith(server.url)} == set(), "a third party"
    context.close()


@pytest.fixture
def visitor(stranger: Visitor) -> Visitor:
    stranger.enter(KEY)
    return stranger


def generate(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.generate(body, headers={"X-API-Key": KEY})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_text_with_the_probability_of_each_token(visitor: Visitor, server: Server) -> None:
    """What stands there is what the API answers, token by token; by mouse or finger, and by keyboard."""
    page = visitor.page
    visitor.set(seed=8, max_length=40, logprobs=3)  # a text of one line
    visitor.run("To be")
    visitor.ended()
    visitor.reads("#answer-A .stats", "end.length")
    told = generate(server, prompt="To be", max_length=40, seed=8, logprobs=3)
    assert visitor.text() == told["generated_text"]
    assert visitor.stat("tokens") == "40"
    assert float(visitor.stat("ttft").split()[0].replace(",", "")) > 0
    tokens = page.locator("#answer-A .token")
    assert tokens.count() == 40
    for i, token in enumerate(told["logprobs"][:10]):
        p = math.exp(token["logprob"])
        level = 0 if p >= 0.5 else 1 if p >= 0.2 else 2 if p >= 0.05 else 3 if p >= 0.01 else 4
        assert f"p{level}" in (tokens.nth(i).get_attribute("class") or "")

    def percent_of(i: int) -> float:
        visitor.reads("#inspector .of", "token.probability")
        text = page.inner_text("#inspector .of span:not(.hint)")
        assert page.locator("#inspector li").count() == 3 + (told["logprobs"][i]["rank"] > 3)
        return float("".join(c for c in text if c in "0123456789."))

    tokens.nth(3).tap() if page.viewport_size == PHONE else tokens.nth(3).hover()
    assert percent_of(3) == pytest.approx(100 * math.exp(told["logprobs"][3]["logprob"]), rel=0.06)
    page.press("#answer-A .text", "End")
    page.wait_for_selector("#answer-A .token:last-of-type.active")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelectorAll('#answer-A .token')[38].classList.contains('active')")
    assert percent_of(38) == pytest.approx(100 * math.exp(told["logprobs"][38]["logprob"]), rel=0.06)
    page.keyboard.press("Escape")
    assert page.is_hidden("#inspector")
    visitor.choose("colour", "checkbox")
    assert page.is_hidden("#legend")
    visitor.run("To be")
    visitor.ended()
    assert visitor.text() == told["generated_text"]
    assert tokens.count() == 0, "nobody asked for them"


def test_it_streams_until_it_is_stopped(visitor: Visitor, server: Server) -> None:
    """Escape ends the text in the engine, too; tokens a second are told while it runs."""
    visitor.set(max_length=1_000_000)
    visitor.run("To be")
    visitor.reads("#answer-A .stats", "end.writing")
    visitor.page.wait_for_function("() => document.querySelectorAll('#answer-A .token').length > 30")
    assert int(visitor.stat("speed").replace(",", "")) > 0
    assert visitor.page.is_disabled("#run")
    visitor.page.keyboard.press("Escape")
    visitor.reads("#answer-A .stats", "end.stopped")
    with server.engine() as engine:
        wait_for(lambda: engine.state().num_running == 0, START_S, "the text has ended")


def test_regenerating(visitor: Visitor) -> None:
    """Another seed each time, which is told, and can be kept."""
    visitor.set(max_length=30, temperature=1.2)
    visitor.run("To be")
    visitor.ended()
    first, seed = visitor.text(), visitor.seed()
    visitor.press("again")
    visitor.page.wait_for_function(
        "seed => document.querySelector('.stat-seed dd').firstChild.data !== String(seed)", arg=seed
    )
    visitor.ended()
    second = visitor.text()
    assert second != first
    visitor.page.click("#answer-A .stat-seed button")
    assert visitor.page.input_value("#set-seed") == str(visitor.seed())
    visitor.press("again")
    visitor.page.wait_for_function("() => !document.querySelector('.stat-seed button')")
    visitor.ended()
    assert visitor.text() == second


def test_two_settings_side_by_side(visitor: Visitor, server: Server) -> None:
    page = visitor.page
    visitor.set(seed=5, max_length=25, temperature=0)
    visitor.choose("compare", "checkbox")
    visitor.set(temperature=1.5)  # B's, which began as a copy of A's
    visitor.run("My lord")
    for column, temperature in (("A", 0), ("B", 1.5)):
        visitor.ended(column)
        told = generate(server, prompt="My lord", seed=5, max_length=25, temperature=temperature)
        assert visitor.text(column) == told["generated_text"]
    assert [each.inner_text().split()[-1] for each in page.locator(".summary strong").all()] == ["0", "1.5"]
    boxes = [page.locator(f"#answer-{column}").bounding_box() for column in "AB"]
    assert boxes[0] is not None
    assert boxes[1] is not None
    beside = boxes[0]["y"] == boxes[1]["y"]
    assert beside if page.viewport_size == DESK else boxes[1]["y"] > boxes[0]["y"]


def test_a_conversation(visitor: Visitor) -> None:
    """Where the checkpoint has a template. Each turn goes with those before; Regenerate asks for the last one again."""
    visitor.choose("mode.chat")
    visitor.set(max_length=12, system="Be brief.")
    answers = []
    for message in ("Who are you", "Why"):
        visitor.run(message)
        visitor.page.wait_for_function("n => document.querySelectorAll('.turn').length === n", arg=2 * len(answers) + 2)
        visitor.ended()
        answers.append(visitor.page.text_content(".turn.model:last-child .new"))
        visitor.page.wait_for_function("() => !document.querySelector('#again').disabled")
    visitor.press("again")
    wait_for(
        lambda: len(visitor.sent("v1/chat/completions")) == 3 and visitor.page.is_enabled("#again"), START_S, "again"
    )
    first, second, third = (body["messages"] for body in visitor.sent("v1/chat/completions"))
    assert first == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you"}]
    assert second == [*first, {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "Why"}]
    assert third == second
    assert visitor.page.locator(".turn").count() == 4
    assert visitor.page.locator(".turn.model .token").count() > 12
    visitor.press("chat.new")
    assert visitor.page.locator(".turn").count() == 0


@pytest.mark.parametrize("stranger", ["en-desk"], indirect=True)
def test_the_programs_do_what_the_page_did(visitor: Visitor) -> None:
    """curl, Python and JavaScript, as they stand there, get the very text; the key stands in none of them."""
    page = visitor.page
    visitor.set(seed=3, max_length=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, stop="zzz\\n")
    visitor.choose("tab.code", "tab")
    assert run_programs(visitor, "To be, it's", "text") == [visitor.text().removeprefix("To be, it's")] * 3
    visitor.choose("mode.chat")
    visitor.run("Who's there")
    page.wait_for_selector(".turn.model .token")
    visitor.ended()
    page.click("#new-chat")
    assert len(set(run_programs(visitor, "Who's there", "chat"))) == 1


def run_programs(visitor: Visitor, prompt: str, mode: str) -> list[str]:
    page = visitor.page
    page.fill("#prompt", prompt)
    programs = {
        name: page.text_content(f"[data-program={name}] code") or "" for name in ("curl", "Python", "JavaScript")
    }
    assert all(KEY not in program and "API_KEY" in program for program in programs.values())
    visitor.run()
    visitor.ended()
    environment = {**os.environ, "API_KEY": KEY, "PYTHONWARNINGS": "ignore"}
    python, curl = (
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
        for command in ([sys.executable, "-c", programs["Python"]], ["bash", "-c", programs["curl"]])
    )
    script = (
        f"async () => {{ const process = {{ env: {{ API_KEY: '{KEY}' }} }}; {programs['JavaScript']}; return text; }}"
    )
    return [texts_in(curl), python, page.evaluate(script)]


def texts_in(events: str) -> str:
    """The text of a stream in either form."""
    text = ""
    for line in events.splitlines():
        if line.startswith("data: {"):
            data = json.loads(line[6:])
            text += data["choices"][0]["delta"].get("content") or "" if "choices" in data else data.get("text", "")
    return text


def test_the_model_and_the_limits_are_this_servers(visitor: Visitor, server: Server) -> None:
    page = visitor.page
    info = requests.get(server.url + "/model_info", headers={"X-API-Key": KEY}, timeout=30).json()
    assert page.inner_text("#served-name") == info["name"] == "shakespeare"
    assert "777" in page.inner_text("#count")
    visitor.set(max_length=99_000_000, temperature=9, top_k=1000)
    assert page.input_value("#set-max_length") == "10000000"
    assert page.input_value("#set-temperature") == "2"
    assert page.input_value("#set-top_k") == str(info["vocabulary"])
    visitor.choose("tab.model", "tab")
    card = page.inner_text("#card")
    for text in (info["family"], f"{info['parameters']:,}", info["device"], info["precision"], info["digest"][:12]):
        assert text in card
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#snippets"), "tabs are moved through by arrow keys"


def test_the_key_stays_in_the_tab(stranger: Visitor) -> None:
    page = stranger.page
    stranger.reads("#notice", "notice.invalid_api_key")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    stranger.reads("#notice", "notice.wrong_key")
    stranger.enter(KEY)
    stranger.set(max_length=3)
    stranger.run("To be")
    stranger.ended()
    kept = page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, history.state])"
    )
    assert KEY not in kept
    assert all(KEY not in request.url and KEY not in (request.post_data or "") for request in stranger.requests)
    page.reload()
    stranger.reads("#notice", "notice.invalid_api_key")
    assert page.input_value("#key") == ""


def test_language_and_theme_are_chosen_and_remembered(visitor: Visitor) -> None:
    page = visitor.page
    before = page.inner_text("#run")
    page.click("#language")
    assert page.inner_text("#run") != before
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    page.reload()
    assert page.inner_text("#run") != before
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_client_over_its_limit_sees_when_it_can_go_on(stranger: Visitor, limited_key: tuple[Path, str]) -> None:
    page = stranger.page
    page.clock.install()
    stranger.enter(limited_key[1])
    stranger.set(max_length=3)
    for _ in range(2):  # one a minute: the first may have been another place's
        stranger.run("To be")
        page.wait_for_function("() => !document.body.classList.contains('running')")
    stranger.reads("#notice", "notice.rate_limited")
    stranger.reads("#run", "run.wait")
    assert page.is_disabled("#run")
    before = int("".join(filter(str.isdigit, page.inner_text("#run"))))
    page.clock.run_for(3000)
    assert int("".join(filter(str.isdigit, page.inner_text("#run")))) < before
    page.clock.run_for(60_000)
    stranger.reads("#notice", "notice.go")
    assert page.is_enabled("#run")


def test_what_the_server_refuses_is_told(visitor: Visitor) -> None:
    page = visitor.page
    visitor.run("")
    visitor.reads("#notice", "notice.empty")
    visitor.run("To be @")
    visitor.reads("#notice", "notice.refused")
    assert "'@'" in page.inner_text("#notice")
    visitor.set(logit_bias="x: 3")
    assert page.get_attribute("#set-logit_bias", "aria-invalid") == "true"


def test_a_server_that_loads_and_an_answer_that_broke_off(visitor: Visitor, server: Server) -> None:
    """The engine is killed in the middle of a text, and the next one held while it loads."""
    visitor.set(max_length=1_000_000)
    visitor.run("To be")
    visitor.page.wait_for_function("() => document.querySelectorAll('#answer-A .token').length > 5")
    old = server.pid_of("nanogpt.engine.process")
    os.kill(old, signal.SIGKILL)
    new = wait_for(
        lambda: next((p for p, c in server.pids().items() if "engine.process" in c and p != old), None),
        START_S,
        "a new engine",
    )
    os.kill(new, signal.SIGSTOP)
    try:
        visitor.reads("#notice", "notice.engine_died")
        visitor.reads("#answer-A .stats", "end.failed")
        assert visitor.page.locator("#answer-A .token").count() > 5, "what had come is still there"
        visitor.reads("#served-state", "state.loading")
        visitor.run()
        visitor.reads("#notice", "notice.loading")
    finally:
        os.kill(new, signal.SIGCONT)
    visitor.reads("#notice", "notice.back")
    visitor.reads("#served-state", "state.ready")


def test_a_connection_that_is_cut_off_and_a_server_that_is_not_there(visitor: Visitor, server: Server) -> None:
    visitor.set(max_length=1_000_000)
    visitor.run("To be")
    visitor.page.wait_for_function("() => document.querySelectorAll('#answer-A .token').length > 5")
    for pid in server.worker_pids():
        os.kill(pid, signal.SIGKILL)
    visitor.reads("#notice", "notice.cut_off")
    visitor.reads("#answer-A .stats", "end.failed")
    visitor.reads("#served-state", "state.ready")
    visitor.page.context.set_offline(True)
    visitor.run()
    visitor.reads("#notice", "notice.unreachable")
    visitor.page.context.set_offline(False)
    visitor.reads("#notice", "notice.back")


@pytest.mark.parametrize(
    ("stranger", "theme"),
    [("en-desk", "light"), ("zh-desk", "dark"), ("en-phone", "dark"), ("zh-phone", "light")],
    indirect=["stranger"],
)
def test_accessibility(visitor: Visitor, theme: str) -> None:
    """axe finds nothing to object to (WCAG 2.2 A and AA), in any state of the page; nothing sticks out at its side."""
    page = visitor.page
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    visitor.set(max_length=40, temperature=1.5, seed=1, logit_bias="x")
    visitor.set(logit_bias="")
    visitor.choose("compare", "checkbox")
    visitor.run("To be")
    for column in "AB":
        visitor.ended(column)
    page.press("#answer-A .text", "End")
    page.wait_for_selector("#inspector:not([hidden])")
    check_with_axe(visitor)
    visitor.choose("mode.chat")
    visitor.run("Who are you")
    visitor.ended("B")
    visitor.run("Who @")
    visitor.reads("#notice", "notice.refused")
    visitor.choose("tab.code" if theme == "dark" else "tab.model", "tab")
    check_with_axe(visitor)
