"""`nanogpt bench` against real servers: figures come out, and every refusal is counted as what it was."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_support import ENDLESS, GUNICORN, Server, wait_for
from support import ROOT

from nanogpt import keys
from nanogpt.bench.capacity import Search, find_capacity
from nanogpt.bench.http import Pool, Target
from nanogpt.bench.load import NOT_SENT, Plan, Progress, Run, run_load
from nanogpt.bench.measures import SLO
from nanogpt.bench.prompts import Lengths, Prompts, Workload, discover
from nanogpt.errors import NanoGPTError

KEY = "the key of the tests"
SMALL = Workload(Lengths(4, 8), Lengths(2, 4), seed=3)
LONG = Workload(Lengths(4, 4), Lengths(200_000, 200_000))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server that computes one text and lets one wait, whose texts may be endless; a key of 2 requests a minute."""
    folder = tmp_path_factory.mktemp("bench")
    limited = keys.add_key(folder / "keys.json", "limited", {"requests_per_minute": 2})
    environment = {
        **ENDLESS, "API_KEY": KEY, "NANOGPT_KEYS_FILE": str(folder / "keys.json"), "NANOGPT_MAX_BATCH_SIZE": "1",
        "NANOGPT_MAX_QUEUE": "1", "NANOGPT_MAX_TOKENS_PER_REQUEST": "1000000",
    }  # fmt: skip
    server = Server([sys.executable, "-m", *GUNICORN], folder, environment, ROOT)
    try:
        server.wait_ready()
        yield server, limited
    finally:
        server.end()


def loaded(
    server: Server, plan: Plan, workload: Workload = SMALL, *, key: str = KEY, timeout_s: float = 30.0,
    show: Callable[[Progress], None] | None = None, give_up: Callable[[Progress], bool] | None = None,
) -> Run:  # fmt: skip
    async def load() -> Run:
        # What the server is, the key that is not limited asks.
        knower, pool = Pool(Target.parse(server.url, KEY), 30.0), Pool(Target.parse(server.url, key), timeout_s)
        try:
            prompts = Prompts(workload, await discover(knower, SMALL))
            return await run_load(pool, prompts, plan, show=show, give_up=give_up)
        finally:
            knower.close()
            pool.close()

    return asyncio.run(load())


def kinds(run: Run) -> dict[str, int]:
    found: dict[str, int] = {}
    for outcome in run.outcomes:
        found[outcome.failure] = found.get(outcome.failure, 0) + 1
    return found


def bench(server: Server, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanogpt", "bench", "serve", server.url]
    return subprocess.run(
        [*command, "--prompt-tokens", "4-8", "--output-tokens", "4", *words],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_run_from_the_command_line(small: tuple[Server, str], tmp_path: Path) -> None:
    """Key from the environment, table on standard output, JSON and page in files; the key in none of them."""
    report, page = tmp_path / "load.json", tmp_path / "load.html"
    done = bench(
        small[0], "--concurrency", "2", "--requests", "12", "--slo", "ttft=10s,itl=1s", "--shared-prefix", "2",
        "--json", str(report), "--html", str(page), API_KEY=KEY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(report.read_text(encoding="utf-8"))
    figures = said["figures"]
    assert figures["completed"] == 12
    assert figures["errors"] == {}
    assert figures["goodput"]["attainment"] == 1.0
    assert figures["output_tokens"]["mean"] == 4.0, "the length that was asked for, whatever the model would have said"
    assert 4 <= figures["prompt_tokens"]["p50"] <= 8
    assert 0 < figures["ttft_ms"]["p50"] <= figures["e2e_ms"]["p50"]
    assert sum(row["tokens"] for row in said["per_second"]) == pytest.approx(48, abs=0.5)
    assert "12 of 12 completed" in done.stdout
    for text in (report.read_text(encoding="utf-8"), page.read_text(encoding="utf-8"), done.stdout, done.stderr):
        assert KEY not in text


def test_a_chat_in_words_has_about_the_length_that_was_asked_for(small: tuple[Server, str]) -> None:
    run = loaded(
        small[0], Plan(concurrency=1, requests=4), Workload(Lengths(60, 60), Lengths(2, 2), chat=True, text=True)
    )
    assert kinds(run) == {"": 4}
    assert all(outcome.prompt_tokens > 0 for outcome in run.outcomes)


def test_a_server_without_the_key_is_told_in_words(small: tuple[Server, str]) -> None:
    done = bench(small[0], "--requests", "2", API_KEY="", OPENAI_API_KEY="")
    assert done.returncode == 1
    assert "401" in done.stderr
    assert "Set API_KEY" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_that_listens_is_told_in_words() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt", "bench", "serve", "http://127.0.0.1:9"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "nothing listens there" in done.stderr


def test_a_limited_key_is_refused_429(small: tuple[Server, str]) -> None:
    run = loaded(small[0], Plan(concurrency=1, requests=4), key=small[1])
    assert kinds(run) == {"": 2, "429 rate_limited": 2}


def test_an_open_loop_sends_on_time_whatever_the_server_does(small: tuple[Server, str]) -> None:
    """One text is computed, one waits, the others are refused at once; the run ends when it is told to."""

    def enough(progress: Progress) -> bool:
        return len(progress.outcomes) >= 6

    run = loaded(small[0], Plan(rate=50.0, requests=8, seed=1), LONG, give_up=enough)
    assert run.cut_short
    assert kinds(run) == {"503 queue_full": 6}


def test_no_more_is_open_than_was_allowed(small: tuple[Server, str]) -> None:
    def enough(progress: Progress) -> bool:
        return len(progress.outcomes) >= 5

    run = loaded(small[0], Plan(rate=200.0, requests=6, max_open=1), LONG, give_up=enough)
    assert kinds(run) == {NOT_SENT: 5}


def test_an_answer_that_takes_too_long_is_a_timeout(small: tuple[Server, str]) -> None:
    run = loaded(small[0], Plan(concurrency=1, requests=1), LONG, timeout_s=0.5)
    assert kinds(run) == {"timeout": 1}


def test_the_search_ends_with_a_rate_and_settings(small: tuple[Server, str]) -> None:
    """Limits that this server meets: what comes out depends on the machine, but not that something does."""

    async def find() -> Any:
        pool = Pool(Target.parse(small[0].url, KEY), 30.0)
        try:
            search = Search(SLO.parse("ttft=20s"), attainment=0.5, trial_s=0.1, max_trials=3)
            return await find_capacity(pool, await discover(pool, SMALL), SMALL, search, say=print)
        finally:
            pool.close()

    found = asyncio.run(find())
    assert 1 <= len(found.trials) <= 3
    assert found.why
    assert found.rate in [0.0, *(trial.rate for trial in found.trials if trial.met)]
    assert (found.as_json()["recommended"] is None) == (found.rate == 0.0)


def test_no_rate_meets_what_one_request_alone_does_not(small: tuple[Server, str]) -> None:
    done = bench(small[0], "--find-capacity", "--slo", "ttft=1us", API_KEY=KEY)
    assert done.returncode == 1
    assert "capacity: none" in done.stdout


def test_a_context_that_is_too_small_is_told_before_anything_is_sent(small: tuple[Server, str]) -> None:
    async def ask() -> None:
        pool = Pool(Target.parse(small[0].url, KEY), 30.0)
        try:
            await discover(pool, Workload(Lengths(300, 300)))
        finally:
            pool.close()

    with pytest.raises(NanoGPTError, match="the model's context is"):
        asyncio.run(ask())


def test_a_stream_whose_worker_dies_is_cut(small: tuple[Server, str]) -> None:
    """Last: the worker that is killed is started again by the server."""
    server = small[0]
    (worker,) = server.worker_pids()
    killed = False

    def kill(progress: Progress) -> None:
        nonlocal killed
        if not killed and progress.events > 5:
            os.kill(worker, signal.SIGKILL)
            killed = True

    run = loaded(server, Plan(concurrency=1, requests=1), LONG, show=kill)
    assert kinds(run) == {"cut": 1}
    assert run.outcomes[0].output_tokens == 0, "a text that was cut counts for no rate"
    wait_for(lambda: server.worker_pids() not in ([], [worker]), 30.0, "the worker is started again")
