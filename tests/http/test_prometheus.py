"""deploy/prometheus and deploy/grafana against a real Prometheus that scrapes a real server.

A query whose metric was renamed returns nothing and complains of nothing: so every name in it has to be in real output,
and every expression of the dashboard has to have a result.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from http_support import BIN, GUNICORN, START_S, Server, running, wait_for
from support import ROOT, require_service

from nanogpt.web.metrics import metrics

pytestmark = pytest.mark.services

DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
KEY = "prometheus-key"
VARIABLES = {"$__rate_interval": "5s", "$job": "nanogpt", "$instance": ".*"}


def dashboard_queries() -> list[tuple[str, str]]:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]


def metric_names(expression: str) -> set[str]:
    without_strings = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\bnanogpt_\w+", without_strings))


class Prometheus:
    """A real one, on a loopback port, with the configuration of deploy/ but for address, key and interval."""

    def __init__(self, folder: Path, target: str) -> None:
        (folder / "key").write_text(KEY)
        shutil.copy(ALERTS, folder)
        text = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
        for ours, theirs in [
            ("localhost:5000", target),
            ("/etc/prometheus/nanogpt-api-key", str(folder / "key")),
            ("scrape_interval: 15s", "scrape_interval: 200ms"),
            ("evaluation_interval: 15s", "evaluation_interval: 200ms"),
        ]:
            assert ours in text
            text = text.replace(ours, theirs)
        (folder / "prometheus.yml").write_text(text)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.url = f"http://{address}"
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address={address}"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def get(self, path: str, **parameters: str) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        result = self.get("query", query=expression)["result"]
        assert isinstance(result, list)
        return result

    def is_scraping(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            if requests.get(f"{self.url}/-/ready", timeout=10).status_code != 200:
                return False
            return any(value["value"][1] == "1" for value in self.query('up{job="nanogpt"}'))
        except requests.ConnectionError:
            return False

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_service("prometheus", shutil.which("prometheus") is not None, "Debian's package prometheus")
    folder = tmp_path_factory.mktemp("server")
    second = str(ROOT / "nanogpt" / "assets" / "default")  # a server has all metrics when it has two models
    environment = {"API_KEY": KEY, "COMPARE_CHECKPOINT": second}
    with running([str(BIN / "gunicorn"), "-w", "2", *GUNICORN[1:]], folder, environment, ROOT) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped the server before and after some traffic."""
    headers = {"X-API-Key": KEY}
    asked = server.generate({"prompt": "To be, or not", "max_length": 5, "model": "compare"}, headers=headers)
    assert asked.status_code == 200, asked.text  # it is there: no alert for it is pending
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), server.url.removeprefix("http://"))
    try:
        server.generate({"prompt": "To be, or not", "max_length": 5}, headers=headers)
        wait_for(prometheus.is_scraping, START_S, "it scrapes the server")
        for _ in range(3):
            assert server.generate({"prompt": "To be, or not", "max_length": 5}, headers=headers).status_code == 200
        more = "increase(nanogpt_requests_finished_total{finished_reason='length'}[5s]) > 0"
        wait_for(lambda: prometheus.query(more), START_S, "it has seen the requests")
        yield prometheus
    finally:
        prometheus.end()


@pytest.fixture(scope="module")
def real_names(server: Server) -> set[str]:
    """The names of real samples. Those about Redis are there once Redis was asked."""
    metrics.redis(True)
    text = server.get("/metrics", headers={"X-API-Key": KEY}).text
    return set(re.findall(r"^(nanogpt_\w+)", text, re.M)) | {
        sample.name for family in metrics.collect() for sample in family.samples
    }


def test_every_query_of_the_dashboard_has_a_result(prometheus: Prometheus, real_names: set[str]) -> None:
    queries = dashboard_queries()
    assert len(queries) > 30
    empty = []
    for title, expression in queries:
        assert metric_names(expression), expression
        assert metric_names(expression) <= real_names, title
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression
        if not prometheus.query(expression):
            empty.append((title, expression))
    assert not empty


def test_every_alert_is_evaluated_and_none_fires_for_a_server_that_is_well(
    prometheus: Prometheus, real_names: set[str]
) -> None:
    def evaluated() -> list[Any]:
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return rules if rules and all(rule["health"] != "unknown" for rule in rules) else []

    rules = wait_for(evaluated, START_S, "the rules are evaluated")
    assert len(rules) == ALERTS.read_text(encoding="utf-8").count("- alert:")
    for rule in rules:
        assert (rule["health"], rule["state"]) == ("ok", "inactive"), rule
        assert metric_names(rule["query"]) <= real_names, rule["name"]
        prometheus.query(rule["query"])


@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=["config", "rules", "alerts"],
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    require_service("promtool", shutil.which("promtool") is not None, "it comes with Debian's package prometheus")
    result = subprocess.run(
        ["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout + result.stderr


def test_every_alert_has_a_test() -> None:
    tested = (DEPLOY / "prometheus" / "alerts_test.yml").read_text(encoding="utf-8")
    silent, fires = tested.partition("- name: Nobody to scrape.")[::2]
    for name in re.findall(r"- alert: (\w+)", ALERTS.read_text(encoding="utf-8")):
        assert f"alertname: {name}}}" in silent, f"{name} is not tested to be silent"
        assert re.search(rf"alertname: {name}\n *exp_alerts:", fires), f"{name} is not tested to fire"
