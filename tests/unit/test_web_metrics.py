"""What workers count, without servers: the folder that they share, and a process that is a server of its own."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from web_support import EchoClient, make_app

from nanogpt.errors import QueueFull
from nanogpt.web import metrics_files, tracing
from nanogpt.web.metrics import CACHE_RESULTS, LIMITS, metrics
from nanogpt.web.metrics_files import MetricsFiles

# Forks workers: each counts so many requests, tells what a scrape of it says, and ends with one still in flight; the
# last two wait for one another, and then tell it again. Fork is what gunicorn does; imports are done but once.
WORKERS = """
import os, sys
from pathlib import Path
from nanogpt.web import metrics as module
from nanogpt.web.metrics_files import MetricsFiles
module._open_files = lambda settings: MetricsFiles(Path(sys.argv[1]))

def tell():
    samples = {s.name + str(s.labels): s.value for family in module.metrics.collect() for s in family.samples}
    os.write(1, repr(samples).encode() + b"\\n")

def work(count):
    module.metrics.http_begins()
    for _ in range(count):
        module.metrics.http_ends("GET", "/", 200, 0.3, None)
        module.metrics.cache("hit")
    tell()

def fork(count, after=lambda: None):
    pid = os.fork()
    if pid == 0:
        work(count)
        after()
        os._exit(0)
    return pid

for count in range(1, 6):
    os.waitpid(fork(count), 0)
ready, go = os.pipe(), os.pipe()
first = fork(10, lambda: (os.write(ready[1], b"x"), os.read(go[0], 1)))
os.read(ready[0], 1)
os.waitpid(fork(20), 0)
os.write(go[1], b"x")
os.waitpid(first, 0)
"""
REQUESTS = "nanogpt_http_requests_total{'method': 'GET', 'route': '/', 'status': '200'}"
BUCKET = "nanogpt_http_request_duration_seconds_bucket{'method': 'GET', 'route': '/', 'le': '0.5'}"
HITS = "nanogpt_response_cache_requests_total{'result': 'hit'}"
IN_FLIGHT = "nanogpt_http_requests_in_flight{}"


def test_every_process_is_counted_exactly_once_also_after_its_end(tmp_path: Path) -> None:
    """The counts of those that have ended stay, their files and their gauges go."""
    result = subprocess.run(
        [sys.executable, "-c", WORKERS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    told = [eval(line) for line in result.stdout.splitlines()]
    assert len(told) == 7
    for name in (REQUESTS, BUCKET, HITS):
        assert [samples[name] for samples in told] == [1, 3, 6, 10, 15, 25, 45]
    # Each began one and ended all that it counted; the last one sees that of the one before it, which lives.
    assert [samples[IN_FLIGHT] for samples in told] == [0, -1, -2, -3, -4, -9, -9 - 19]
    left = {path.name.rpartition("_")[2] for path in tmp_path.glob("*.db")}
    assert len(left) == 3, "the ended, and the two that have ended since"


def test_nobody_waits_for_ever_for_a_process_that_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was stopped in the middle of a scrape must not take the others with it."""
    monkeypatch.setattr(metrics_files, "_LOCK_S", 0.05)
    files = MetricsFiles(tmp_path / "metrics")
    with (tmp_path / "metrics" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="held the lock"):
            files.collect()
    files.collect()


def value(http: Any, sample: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == sample), 0.0)


def test_a_process_of_its_own_counts_alone() -> None:
    """`flask run`, a test, somebody else's server: no files, no folder."""
    engine = EchoClient()
    http = make_app(engine).test_client()
    name = 'nanogpt_http_requests_total{method="POST",route="/generate",status="200"}'
    full = 'nanogpt_request_errors_total{code="queue_full"}'
    before = value(http, name), value(http, full)
    for _ in range(3):
        http.post("/generate", json={"prompt": "ab", "max_length": 2}).close()
    engine.refuse = QueueFull("full")
    http.post("/generate", json={"prompt": "ab"}).close()
    assert (value(http, name), value(http, full)) == (before[0] + 3, before[1] + 1)
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


def test_errors_inside_a_stream_are_counted_like_refusals() -> None:
    engine = EchoClient()
    engine.error = "a step that failed"
    http = make_app(engine).test_client()
    name = 'nanogpt_request_errors_total{code="engine_died"}'
    before = value(http, name)
    answer = http.post("/generate", json={"prompt": "ab", "max_length": 2, "stream": True})
    assert b"engine_died" in answer.data
    answer.close()
    assert value(http, name) == before + 1


def test_a_method_or_path_of_the_clients_own_is_no_label() -> None:
    """Whoever invents paths must not make the page grow."""
    http = make_app().test_client()
    for i in range(5):
        http.open(f"/invented-{i}", method=f"INVENTED{i}").close()
    text = http.get("/metrics").text
    assert "invented" not in text.lower()
    assert 'method="(no method)",route="(no route)"' in text


def test_what_the_cache_and_the_limits_say_is_shown() -> None:
    http = make_app().test_client()
    for result in CACHE_RESULTS:
        metrics.cache(result)
    for kind in LIMITS:
        metrics.refused(kind)
    metrics.redis(False)
    assert value(http, "nanogpt_redis_up") == 0
    assert value(http, "nanogpt_redis_failures_total") >= 1
    metrics.redis(True)
    assert value(http, "nanogpt_redis_up") == 1
    for result in CACHE_RESULTS:
        assert value(http, f'nanogpt_response_cache_requests_total{{result="{result}"}}') >= 1
    for kind in LIMITS:
        assert value(http, f'nanogpt_limit_refusals_total{{limit="{kind}"}}') >= 1


def test_while_the_engine_is_gone_its_numbers_are_not_shown() -> None:
    """Old numbers would look like an engine that stands still."""
    http = make_app().test_client()
    text = http.get("/metrics").text
    assert "nanogpt_engine_ready 1.0" in text
    assert "nanogpt_num_requests_running" not in text


# -- traces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_when_there_are_traces(environ: dict[str, str], wanted: bool) -> None:
    assert tracing.is_wanted(environ) is wanted


@pytest.fixture
def asked_for_traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "_provider", tracing._Provider())
    level = logging.getLogger("opentelemetry").level
    yield
    logging.getLogger("opentelemetry").setLevel(level)


def test_without_opentelemetry_the_server_serves_and_says_what_is_missing(
    asked_for_traces: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    http = make_app().test_client()
    for _ in range(2):
        answer = http.post("/generate", json={"prompt": "ab", "max_length": 2})
        assert answer.status_code == 200
        assert "traceparent" not in answer.headers
    said = [record.getMessage() for record in caplog.records if "OpenTelemetry" in record.getMessage()]
    assert len(said) == 1
    assert "pip install 'nano-gpt-api[otel]'" in said[0]


def test_a_variable_that_opentelemetry_refuses_stops_nothing(
    asked_for_traces: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")  # smaller than a batch
    assert make_app().test_client().get("/").status_code == 200
    assert "OTEL_" in caplog.text


@pytest.mark.parametrize(
    ("header", "trace_id"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "4bf92f3577b34da6a3ce929d0e0e4736"),
        ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more", "4bf92f3577b34da6a3ce929d0e0e4736"),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", None),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", None),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736", None),
        ("", None),
    ],
)
def test_the_clients_trace_is_in_the_log_also_without_opentelemetry(
    caplog: pytest.LogCaptureFixture, header: str, trace_id: str | None
) -> None:
    with caplog.at_level(logging.INFO, "nanogpt"):
        make_app().test_client().get("/", headers={"traceparent": header}).close()
    assert [record.fields.get("trace_id") for record in caplog.records][-1:] == [trace_id]  # type: ignore[attr-defined]
