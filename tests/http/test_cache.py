"""The response cache in a real server, over a real engine: repeated requests, fifty at once, an engine that dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from http_support import BIN, ENDLESS, ENDLESS_BODY, GUNICORN, START_S, Server, read_events, running, stream, wait_for
from support import ROOT

from nanogpt.engine.client import EngineClient

# An engine that was killed may take its time to come back on a busy machine.
SETTINGS = {**ENDLESS, "NANOGPT_ENGINE_WAIT_S": "60"}


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running([str(BIN / GUNICORN[0]), *GUNICORN[1:]], tmp_path_factory.mktemp("cache"), SETTINGS, ROOT) as server:
        yield server


def use(answer: requests.Response) -> str:
    return answer.headers["X-Cache"]


def without_timings(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "timings"}


def num_output_tokens(engine: EngineClient) -> int:
    return engine.state().stats.get("num_output_tokens", 0)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "ROMEO:", "max_length": 40, "temperature": 0},
        {"prompt": "JULIET:", "max_length": 40, "seed": 11, "top_p": 0.9},
        {"prompt": "KING", "max_length": 100, "seed": 11, "stop": ["e ", "th"]},
    ],
    ids=["greedy", "seeded", "stopped"],
)
def test_a_repeated_request_gets_the_same_answer_to_the_bit(one_worker: Server, body: dict[str, Any]) -> None:
    first, second = one_worker.generate(body), one_worker.generate(body)
    streamed = stream(one_worker, body)
    apart = one_worker.generate({**body, "cache": False})
    assert [use(answer) for answer in (first, second, streamed, apart)] == ["miss", "hit", "hit", "bypass"]
    assert without_timings(first.json()) == without_timings(second.json())
    *pieces, (_, final) = read_events(streamed)
    assert without_timings(final) == without_timings(first.json())
    assert body["prompt"] + "".join(data["text"] for _, data in pieces) == first.json()["generated_text"]
    assert apart.json()["generated_text"] == first.json()["generated_text"]


def test_fifty_identical_requests_at_once_cost_one_generation(one_worker: Server) -> None:
    body = {"prompt": "To be, or not", "max_length": 110, "seed": 5}

    def ask(number: int) -> tuple[str, str]:
        if number % 2:
            answer = one_worker.generate(body)
            return use(answer), answer.json()["generated_text"]
        answer = stream(one_worker, body)
        *_, (_, final) = read_events(answer)
        return use(answer), final["generated_text"]

    with one_worker.engine() as engine:
        wait_for(lambda: engine.state().stats, START_S, "the engine has told its numbers")
        before = num_output_tokens(engine)
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(ask, range(50)))
        assert sorted(said for said, _ in answers) == ["hit"] * 49 + ["miss"]
        assert len({text for _, text in answers}) == 1
        wait_for(lambda: num_output_tokens(engine) >= before + 110, START_S, "the engine has counted")
        assert num_output_tokens(engine) == before + 110


def test_a_client_that_leaves_takes_the_text_from_nobody_else(one_worker: Server) -> None:
    """The first one's generation goes on while a second one listens, and ends with it."""
    body = {**ENDLESS_BODY, "cache": True}
    with one_worker.engine() as engine:
        first = stream(one_worker, body)
        first_events = read_events(first)  # whoever drops it hangs up
        next(first_events)
        second = stream(one_worker, body)
        events = read_events(second)
        next(events)
        assert (use(first), use(second)) == ("miss", "hit")
        first.close()
        for _ in range(60):  # more than were under way
            name, data = next(events)
            assert (name, list(data)) == ("message", ["text"])
        wait_for(lambda: engine.state().num_running == 1, START_S, "one runs")
        second.close()
        wait_for(lambda: engine.state().num_running == 0, START_S, "the generation ends")


def test_what_was_computed_outlives_the_engine(one_worker: Server) -> None:
    """The next engine has the same weights: an answer that is there is given, and nothing is computed."""
    body = {"prompt": "What, ho!", "max_length": 30, "temperature": 0}
    first = one_worker.generate(body)
    os.kill(one_worker.pid_of("nanogpt.engine.process"), signal.SIGKILL)
    second = one_worker.generate(body)
    assert (use(first), use(second)) == ("miss", "hit")
    assert without_timings(second.json()) == without_timings(first.json())
    with one_worker.engine() as engine:
        assert num_output_tokens(engine) == 0


def test_the_log_tells_where_an_answer_came_from(one_worker: Server) -> None:
    body = {"prompt": "Good morrow", "max_length": 5, "seed": 1}
    for request_id in ("log-1", "log-2"):
        one_worker.generate(body, headers={"X-Request-Id": request_id})
    one_worker.generate({**body, "seed": None}, headers={"X-Request-Id": "log-3"})

    def said() -> list[str] | None:
        lines = [line for line in one_worker.log.splitlines() if "Response: " in line and " id=log-" in line]
        return lines if len(lines) == 3 else None

    lines = wait_for(said, START_S, "the three lines")
    assert ["cache=miss" in lines[0], "cache=hit" in lines[1], "cache=bypass" in lines[2]] == [True] * 3
