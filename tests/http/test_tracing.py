"""Traces of a real server, as a collector gets them: one tree a request, in the client's trace, without its prompt."""

from __future__ import annotations

import re
import secrets
import signal
import time
from collections.abc import Iterator

import pytest
from http_support import BIN, GUNICORN, START_S, Server, read_events, running, stream, wait_for
from otlp_collector import Collector
from support import ROOT

PROMPT = "Marked prompt, to be found nowhere"
BODY = {"prompt": PROMPT, "max_length": 9, "temperature": 0.5, "top_k": 7, "seed": 11}
SERVER_KIND = 2


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=collector-key",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "API_KEY": "k",
    }
    folder = tmp_path_factory.mktemp("traced")
    with running([str(BIN / "gunicorn"), "-w", "2", *GUNICORN[1:]], folder, environment, ROOT) as server:
        yield server


def traceparent(*, sampled: bool = True) -> tuple[str, str, str]:
    """(header, trace id, span id), new ones."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return f"00-{trace_id}-{span_id}-0{int(sampled)}", trace_id, span_id


def test_one_tree_a_request(server: Server, collector: Collector) -> None:
    header, trace_id, parent_id = traceparent()
    began_ns = time.time_ns()
    answer = server.generate(
        BODY, headers={"traceparent": header, "tracestate": "a=b", "X-API-Key": "k", "X-Request-Id": "traced-1"}
    )
    ended_ns = time.time_ns()
    tree = wait_for(lambda: len(found := collector.tree(trace_id)) == 5 and found, START_S, "the spans arrive")
    http, text = tree["POST /generate"], tree["text_completion default"]
    queue, prefill, decode = tree["queue"], tree["prefill"], tree["decode"]
    assert answer.headers["traceparent"] == f"00-{trace_id}-{http.span_id}-01"
    assert (http.kind, http.parent_id, text.parent_id) == (SERVER_KIND, parent_id, http.span_id)
    assert {part.parent_id for part in (queue, prefill, decode)} == {text.span_id}
    assert http.attributes == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "nanogpt.request_id": "traced-1",
    }
    assert text.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "nanogpt",
        "gen_ai.request.model": "default",
        "gen_ai.response.model": "default",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 11,
        "gen_ai.usage.input_tokens": len(PROMPT),
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": answer.json()["usage"]["cached_tokens"],
        "gen_ai.response.finish_reasons": ["length"],
    }
    # One after the other, as the engine measured them, within the request.
    assert began_ns <= http.start_ns <= text.start_ns == queue.start_ns
    assert queue.end_ns == prefill.start_ns
    assert prefill.end_ns == decode.start_ns
    assert decode.end_ns <= text.end_ns + 10_000_000  # the engine's clock starts a moment earlier than the worker's
    assert text.end_ns <= http.end_ns <= ended_ns + 1_000_000_000
    assert prefill.duration_s > 0
    assert decode.duration_s > 0
    assert abs(queue.duration_s - answer.json()["timings"]["queue_s"]) < 1e-5
    assert http.resource["service.name"] == "nano-gpt-api"
    assert http.resource["deployment.environment.name"] == "test"
    assert collector.headers[-1]["authorization"] == "collector-key"
    wait_for(lambda: f"trace_id={trace_id}" in server.log, START_S, "the log names the trace")


def test_a_stream_is_traced_to_its_end(server: Server, collector: Collector) -> None:
    header, trace_id, _ = traceparent()
    with stream(server, BODY, headers={"traceparent": header, "X-API-Key": "k"}) as answer:
        assert list(read_events(answer))[-1][1]["finish_reason"] == "length"
    tree = wait_for(lambda: len(found := collector.tree(trace_id)) == 5 and found, START_S, "the spans arrive")
    assert tree["text_completion default"].attributes["gen_ai.usage.output_tokens"] == 9


def test_a_refusal_has_a_span_that_says_why(server: Server, collector: Collector) -> None:
    header, trace_id, _ = traceparent()
    server.generate(BODY, headers={"traceparent": header, "X-API-Key": "wrong"})
    tree = wait_for(lambda: collector.tree(trace_id), START_S, "the span arrives")
    assert set(tree) == {"POST /generate"}
    attributes = tree["POST /generate"].attributes
    assert (attributes["http.response.status_code"], attributes["error.type"]) == (401, "invalid_api_key")


def test_whom_nobody_samples_is_not_sent(server: Server, collector: Collector) -> None:
    """The caller's decision holds; the ids go on all the same."""
    header, trace_id, _ = traceparent(sampled=False)
    answer = server.generate(BODY, headers={"traceparent": header, "X-API-Key": "k"})
    assert re.fullmatch(rf"00-{trace_id}-[0-9a-f]{{16}}-00", answer.headers["traceparent"])
    later, later_id, _ = traceparent()
    # Both workers have answered (and sent) something later than that.
    for _ in range(8):
        server.get("/", headers={"traceparent": later})
    wait_for(lambda: sum(span.trace_id == later_id for span in collector.spans) == 8, START_S, "the later ones arrive")
    assert not collector.tree(trace_id)


@pytest.mark.parametrize(
    "header", ["", "00-0-0-01", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "x" * 5000, "ff-" + "1" * 32]
)
def test_a_wrong_traceparent_begins_a_new_trace(server: Server, header: str) -> None:
    answer = server.get("/", headers={"traceparent": header})
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", answer.headers["traceparent"])
    assert "1" * 32 not in answer.headers["traceparent"]


def test_no_prompt_and_no_answer_in_any_span(server: Server, collector: Collector) -> None:
    header, trace_id, _ = traceparent()
    answer = server.generate({**BODY, "stop": ["Marked stop"]}, headers={"traceparent": header, "X-API-Key": "k"})
    wait_for(lambda: len(collector.tree(trace_id)) == 5, START_S, "the spans arrive")
    for text in ("Marked", answer.json()["generated_text"].removeprefix(PROMPT), "collector-key"):
        assert text.encode() not in collector.raw


def test_what_is_queued_is_sent_when_a_worker_ends(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    folder = tmp_path_factory.mktemp("ending")
    server = Server([str(BIN / "gunicorn"), "-w", "1", *GUNICORN[1:]], folder, environment, ROOT)
    try:
        server.wait_ready()
        header, trace_id, _ = traceparent()
        server.get("/", headers={"traceparent": header, "Connection": "close"})
        assert not collector.tree(trace_id)
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert set(collector.tree(trace_id)) == {"GET /"}
    finally:
        server.end()


def test_a_collector_that_hangs_holds_up_nobody(tmp_path_factory: pytest.TempPathFactory) -> None:
    """More requests than the queue of spans holds, a collector that answers nothing: all are served, and exit is 0."""
    hanging = Collector()
    hanging.hang.set()
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": hanging.url,
        "OTEL_BSP_MAX_QUEUE_SIZE": "4",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "2",
        "OTEL_BSP_SCHEDULE_DELAY": "10",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "60",
    }
    folder = tmp_path_factory.mktemp("hanging")
    server = Server([str(BIN / "gunicorn"), "-w", "1", *GUNICORN[1:]], folder, environment, ROOT)
    try:
        server.wait_ready()
        for _ in range(20):
            assert server.generate({"prompt": "To be", "max_length": 2}).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
    finally:
        hanging.close()
        server.end()
