"""Ray Serve as an operator runs it: a cluster, ``serve run`` with our configuration file, requests through the proxy.

Run by ``make ray-test``: Ray starts a dozen processes (half a minute on two idle cores), once for all of these tests.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from http_support import read_events, wait_for
from ray_support import START_S, Cluster, free_port
from support import ROOT, require_service

pytestmark = [pytest.mark.cluster, pytest.mark.services, pytest.mark.timeout(600)]

ENDLESS = {"prompt": "To be", "max_length": 1_000_000, "cache": False}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_service("ray", importlib.util.find_spec("ray") is not None, "pip install 'nano-gpt-api[ray]'")
    port = free_port()
    config = (ROOT / "deploy" / "ray" / "serve.yaml").read_text()
    for given, wanted in (
        ("port: 8000", f"port: {port}"),
        ("max_replicas: 4", "max_replicas: 2"),
        (
            "cpus: 1\n",
            'cpus: 0.5\n      rate_limit: "off"\n      context_overflow: crop\n      max_new_tokens: 1000000\n',
        ),
    ):
        assert given in config
        config = config.replace(given, wanted)
    # Short: the paths of Unix sockets are.
    cluster = Cluster(tmp_path_factory.mktemp("r"))
    try:
        cluster.start()
        cluster.serve(config)
        cluster.wait_ready(f"http://127.0.0.1:{port}")
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(autouse=True)
def _both_replicas(cluster: Cluster) -> None:
    """Each test finds two, also after one that has killed one."""
    wait_for(lambda: len(_ready_replicas(cluster)) == 2, START_S, "two replicas serve")


def _samples(cluster: Cluster, name: str) -> dict[str, float]:
    """A metric by replica."""
    found: dict[str, float] = {}
    for line in requests.get(f"{cluster.url}/metrics", timeout=30).text.splitlines():
        if line.startswith(f'{name}{{replica="'):
            replica = line.split('"')[1]
            found[replica] = found.get(replica, 0) + float(line.rsplit(" ", 1)[1])
    return found


def _ready_replicas(cluster: Cluster) -> list[str]:
    return [replica for replica, ready in _samples(cluster, "nanogpt_engine_ready").items() if ready]


def _num_running(cluster: Cluster) -> float:
    return sum(_samples(cluster, "nanogpt_num_requests_running").values())


def test_answers_are_those_of_the_one_app(cluster: Cluster) -> None:
    """Every route, refusal and header: nothing is written anew for Ray."""
    answer = cluster.post("/generate", {"prompt": "To be", "max_length": 8, "temperature": 0})
    assert answer.status_code == 200
    assert answer.json()["tokens_generated"] == 8
    assert answer.headers["X-Request-Id"].count(",") == 0  # Ray's proxy tells it, too
    refused = cluster.post("/v1/completions", {"model": "default", "prompt": 7})
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert cluster.post("/generate", {"prompt": "a" * 2_000_000}).status_code == 413
    assert requests.get(f"{cluster.url}/model_info", timeout=30).json()["name"] == "default"
    assert requests.get(f"{cluster.url}/nothing", timeout=30).json()["code"] == "not_found"
    assert requests.get(f"{cluster.url}/admin/models", timeout=30).status_code == 404


def test_tokens_come_one_by_one_and_a_client_that_leaves_stops_its_text(cluster: Cluster) -> None:
    """An endless text: were it held back anywhere, no event would ever come; were it not aborted, it would run on."""
    with cluster.post("/generate", {**ENDLESS, "stream": True}, stream=True) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = read_events(answer)
        assert all(next(events)[0] == "message" for _ in range(10))
        wait_for(lambda: _num_running(cluster) == 1, 30, "it runs")
    wait_for(lambda: _num_running(cluster) == 0, 30, "the text is aborted")


def test_prompts_that_begin_alike_meet_in_one_replica(cluster: Cluster) -> None:
    # So many that all of them in one replica would be a defect: by chance it happens once in eight million times.
    beginnings = [f"Thou {letter} art not what thou hast been to " for letter in "abcdefghijklmnopqrstuvwx"]

    def replica(prompt: str) -> str:
        answer = cluster.post("/generate", {"prompt": prompt, "max_length": 1})
        assert answer.status_code == 200, answer.text
        return answer.headers["X-Replica"]

    seen = {beginning: {replica(beginning * 4 + end) for end in ("him", "me")} for beginning in beginnings}
    assert all(len(replicas) == 1 for replicas in seen.values()), seen
    assert len(set().union(*seen.values())) == 2


def test_a_replica_dies_under_load(cluster: Cluster) -> None:
    """What had not begun is answered by another; what had begun ends with an error event, and nothing is silent."""
    streams: list[tuple[requests.Response, Iterator[tuple[str, Any]]]] = []
    while len({answer.headers["X-Replica"] for answer, _ in streams}) < 2:
        body = {**ENDLESS, "stream": True, "seed": len(streams)}
        answer = cluster.post("/generate", body, stream=True, headers={"X-Session-Id": str(len(streams))})
        assert answer.status_code == 200, answer.text
        streams.append((answer, read_events(answer)))
        assert next(streams[-1][1])[0] == "message"

    def whole(i: int) -> requests.Response:
        body = {"prompt": "To be", "max_length": 200, "seed": i, "cache": False}
        return cluster.post("/generate", body, headers={"X-Session-Id": f"whole {i}"})

    with ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(whole, i) for i in range(12)]
        wait_for(lambda: _num_running(cluster) > len(streams), 60, "more than the streams runs")
        before = set(_ready_replicas(cluster))
        os.kill(min(cluster.replica_pids()), signal.SIGKILL)
        wait_for(lambda: len(set(_ready_replicas(cluster)) & before) == 1, 60, "one is gone")
        (survivor,) = set(_ready_replicas(cluster)) & before
        whole_answers = [answer.result(300) for answer in answers]

    assert [answer.status_code for answer in whole_answers] == [200] * len(answers)
    assert {answer.json()["tokens_generated"] for answer in whole_answers} == {200}
    for answer, events in streams:
        if answer.headers["X-Replica"] == survivor:
            assert next(events)[0] == "message"  # it would go on for ever
            answer.close()
        else:
            *_, (name, data) = events
            assert (name, data["code"]) == ("error", "engine_died")
            assert data["request_id"]
