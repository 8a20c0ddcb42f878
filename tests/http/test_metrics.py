"""/metrics of a real server with four workers: every scrape tells the whole truth, whichever worker answers it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from http_support import BIN, GUNICORN, START_S, Server, running, wait_for
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from support import ROOT, require_service

KEY = {"X-API-Key": "metrics-key"}
BODY = {"prompt": "To be, or not to be", "max_length": 7}
Samples = Counter[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("metrics")
    with running(
        [str(BIN / "gunicorn"), "-w", "4", *GUNICORN[1:]], folder, {"API_KEY": KEY["X-API-Key"]}, ROOT
    ) as server:
        yield server


def scrape(server: Server) -> Samples:
    """Every sample by its name and labels, as they stand in the text. A connection of its own: any worker answers."""
    answer = server.get("/metrics", headers=KEY)
    assert answer.status_code == 200
    lines = (line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#"))
    return Counter({name: float(value) for name, _, value in lines})


def generated(samples: Samples) -> float:
    return samples['nanogpt_generation_tokens_total{model_name="default"}']


def generate(server: Server) -> requests.Response:
    return server.generate(BODY, headers=KEY)


def files_of(server: Server) -> set[int]:
    """The processes whose files lie in the folder of the workers' numbers."""
    folder = next(server.run_dir.glob("workers-*")) / "metrics"
    return {int(path.stem.rpartition("_")[2]) for path in folder.glob("*.db") if "ended" not in path.name}


ANSWERED = 'nanogpt_http_requests_total{method="POST",route="/generate",status="200"}'
TIMED = 'nanogpt_http_request_duration_seconds_count{method="POST",route="/generate"}'
LENGTH = 'nanogpt_requests_finished_total{finished_reason="length",model_name="default"}'
RESTARTS = "nanogpt_engine_restarts_total"
IN_FLIGHT = "nanogpt_http_requests_in_flight"


def test_every_scrape_counts_every_request_whichever_worker_had_it(server: Server) -> None:
    """Forty requests over four workers while others scrape: no scrape goes backwards, and all end at forty more."""
    before = scrape(server)
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(generate, server) for _ in range(40)]
        meanwhile = [pool.submit(scrape, server) for _ in range(20)]
        assert {answer.result().status_code for answer in answers} == {200}
        for scraped in meanwhile:
            assert before[ANSWERED] <= scraped.result()[ANSWERED] <= before[ANSWERED] + 40
        wanted = before[ANSWERED] + 40
        # The client has the last byte a moment before it is counted, and the engine tells four times a second.
        wait_for(lambda: (now := scrape(server))[ANSWERED] == wanted and generated(now) >= generated(before) + 280,
                 START_S, "all are counted")  # fmt: skip
        scrapes = [s.result() for s in [pool.submit(scrape, server) for _ in range(24)]]
    for samples in scrapes:
        assert samples[ANSWERED] == samples[TIMED] == wanted
        assert generated(samples) == generated(before) + 40 * 7
        assert samples[LENGTH] == before[LENGTH] + 40
        assert samples['nanogpt_prompt_tokens_total{model_name="default"}'] == (
            before['nanogpt_prompt_tokens_total{model_name="default"}'] + 40 * len(BODY["prompt"])  # type: ignore[arg-type]
        )
        assert samples['nanogpt_time_to_first_token_seconds_count{model_name="default"}'] == samples[LENGTH]
        # A token has another before it, unless it is the first of its text.
        assert samples['nanogpt_inter_token_latency_seconds_count{model_name="default"}'] == (
            generated(samples) - samples[LENGTH]
        )
        assert samples['nanogpt_num_requests_running{model_name="default"}'] == 0
        assert 1 <= samples[IN_FLIGHT] <= 24
    assert len(server.worker_pids()) == 4


def test_errors_are_counted_by_their_code(server: Server) -> None:
    before = scrape(server)
    server.generate({"prompt": ""}, headers=KEY)
    server.generate(BODY, headers={"X-API-Key": "wrong"})
    server.get("/nothing", headers=KEY)
    wanted = [("invalid_request", 1), ("invalid_api_key", 1), ("not_found", 1)]
    names = {f'nanogpt_request_errors_total{{code="{code}"}}': count for code, count in wanted}

    def increase() -> bool:
        now = scrape(server)
        return all(now[name] == before[name] + count for name, count in names.items())

    wait_for(increase, START_S, "the errors are counted")


def test_a_text_that_a_stop_string_ended_counts_as_stop(server: Server) -> None:
    """The worker finds the stop string and tells the engine to end; that is no abort."""
    text = generate(server).json()["generated_text"].removeprefix(str(BODY["prompt"]))
    before = scrape(server)
    reason = 'nanogpt_requests_finished_total{{finished_reason="{}",model_name="default"}}'.format
    seeded = {**BODY, "max_length": 400, "temperature": 0}
    text = server.generate(seeded, headers=KEY).json()["generated_text"].removeprefix(str(BODY["prompt"]))
    answer = server.generate({**seeded, "stop": [text[20:30]]}, headers=KEY).json()
    assert answer["finish_reason"] == "stop"
    wait_for(lambda: scrape(server)[reason("stop")] == before[reason("stop")] + 1, START_S, "it counts as stop")
    assert scrape(server)[reason("abort")] == before[reason("abort")]


def test_a_worker_that_is_killed_takes_no_counts_with_it(server: Server) -> None:
    first = scrape(server)
    for _ in range(12):
        assert generate(server).status_code == 200
    wanted = first[ANSWERED] + 12
    before = wait_for(lambda: (now := scrape(server))[ANSWERED] == wanted and now, START_S, "all are counted")
    workers = set(server.worker_pids())
    for pid in sorted(workers)[:2]:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(set(server.worker_pids()) - workers) == 2, START_S, "they are replaced")

    def ask() -> Samples | None:
        try:
            return scrape(server)
        except requests.ConnectionError:  # it was the dead one's connection
            return None

    for _ in range(12):
        samples = wait_for(ask, START_S, "somebody answers")
        assert samples[ANSWERED] == before[ANSWERED]
        assert samples[TIMED] == before[TIMED]
    assert not files_of(server) & set(sorted(workers)[:2]), "what they left is added up once, and removed"


def test_an_engine_that_dies_is_a_counter_reset_and_a_restart(server: Server) -> None:
    assert generate(server).status_code == 200
    before = wait_for(lambda: (now := scrape(server))[LENGTH] and now, START_S, "the engine has told its numbers")
    os.kill(server.pid_of("nanogpt.engine.process"), signal.SIGKILL)
    wait_for(lambda: scrape(server)[RESTARTS] == before[RESTARTS] + 1, START_S, "the restart is counted")
    wait_for(lambda: server.get("/ready").status_code == 200, START_S, "it is back")
    assert generate(server).status_code == 200
    after = wait_for(lambda: (now := scrape(server))[LENGTH] == 1 and now, START_S, "it counts from the start")
    assert after[ANSWERED] >= before[ANSWERED] + 1, "the workers' counters go on"
    for samples in [scrape(server) for _ in range(12)]:
        assert samples[RESTARTS] == before[RESTARTS] + 1


def test_workers_that_are_replaced_by_a_reload_leave_nothing_behind(server: Server) -> None:
    before = scrape(server)
    workers = set(server.worker_pids())
    server.signal(signal.SIGHUP)
    wait_for(lambda: not workers & set(server.worker_pids()), START_S, "the old workers are gone")
    wait_for(lambda: len(server.worker_pids()) == 4, START_S, "the new ones are there")
    samples = wait_for(lambda: (now := scrape(server))[IN_FLIGHT] == 1 and now, START_S, "one in flight: the scrape")
    assert samples[ANSWERED] == before[ANSWERED]
    wait_for(lambda: scrape(server) and not files_of(server) & workers, START_S, "their files are gone")


def test_the_page_is_closed_without_the_key(server: Server) -> None:
    assert server.get("/metrics").status_code == 401
    bearer = {"Authorization": f"Bearer {KEY['X-API-Key']}"}
    assert server.get("/metrics", headers=bearer).status_code == 200


@pytest.mark.parametrize(
    ("accept", "content_type", "parser"),
    [
        ("", "text/plain; version=0.0.4", parse),
        ("application/openmetrics-text; version=1.0.0,text/plain", "application/openmetrics-text", parse_openmetrics),
        ("application/openmetrics-text; version=one", "text/plain; version=0.0.4", parse),
    ],
)  # fmt: skip
def test_both_formats(
    server: Server, accept: str, content_type: str, parser: Callable[[str], Iterator[object]]
) -> None:
    answer = server.get("/metrics", headers={**KEY, "Accept": accept})
    assert answer.headers["Content-Type"].startswith(content_type)
    assert len(list(parser(answer.text))) > 20


@pytest.mark.services
def test_promtool_finds_nothing_to_complain_of(server: Server) -> None:
    require_service("promtool", shutil.which("promtool") is not None, "it comes with Debian's package prometheus")
    generate(server)
    text = server.get("/metrics", headers=KEY).text
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_every_metric_is_documented_and_no_other(server: Server) -> None:
    """docs/metrics.md against real output: name, type, labels."""
    generate(server)
    text = server.get("/metrics", headers=KEY).text
    page = (Path(ROOT) / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(nanogpt_\w+)` \| (.+) \|$", page, re.M))
    shown = {}
    for family in parse(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        shown[name] = f"{family.type} | " + (", ".join(f"`{label}`" for label in sorted(labels)) or "none")
    only_with_redis = {"nanogpt_redis_up", "nanogpt_redis_failures_total"}
    assert set(rows) - only_with_redis == set(shown)
    wrong = {name: (rows[name], wanted) for name, wanted in shown.items() if not rows[name].startswith(wanted + " |")}
    assert not wrong
