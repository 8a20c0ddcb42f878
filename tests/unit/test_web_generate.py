"""POST /generate without a real engine: the guide's request and answer, streaming, and every kind of refusal."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient
from web_support import EchoClient, make_app

from nanogpt.engine.messages import EngineState, Tokens
from nanogpt.errors import EngineDied, EngineLoading, QueueFull


@pytest.fixture
def engine() -> EchoClient:
    return EchoClient()


@pytest.fixture
def http(engine: EchoClient) -> FlaskClient:
    return make_app(engine).test_client()


def post(http: FlaskClient, body: Any, **kwargs: Any) -> Any:
    return http.post("/generate", json=body, **kwargs)


def events(data: bytes) -> list[tuple[str, Any]]:
    """The (name, object) of each server-sent event; comments left out."""
    found = []
    for block in data.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            found.append((fields.get("event", "message"), json.loads(fields["data"])))
    return found


# -- the guide's request and answer -----------------------------------------------------------------------------


def test_the_guides_request_gets_the_guides_answer(http: FlaskClient) -> None:
    answer = post(http, {"prompt": "Once upon a time", "max_length": 150, "temperature": 0.8, "top_k": 50})
    assert answer.status_code == 200
    assert answer.mimetype == "application/json"
    body = answer.json
    assert list(body)[:3] == ["prompt", "generated_text", "tokens_generated"]
    assert body["prompt"] == "Once upon a time"
    assert body["generated_text"].startswith("Once upon a timeOnce")
    assert len(body["generated_text"]) == len("Once upon a time") + 150
    assert body["tokens_generated"] == 150


def test_the_answer_adds_why_it_ended_by_whom_and_what_it_cost(http: FlaskClient) -> None:
    body = post(http, {"prompt": "ab", "max_length": 3}).json
    assert body["finish_reason"] == "length"
    assert body["model"] == "echo"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "cached_tokens": 0}
    assert set(body["timings"]) == {"queue_s", "ttft_s", "total_s", "tokens_per_second"}
    assert 0 <= body["timings"]["ttft_s"] <= body["timings"]["total_s"]


def test_defaults_are_the_guides(http: FlaskClient, engine: EchoClient) -> None:
    assert post(http, {"prompt": "a"}).json["tokens_generated"] == 100
    params = engine.generations[0].request.params
    assert (params.max_tokens, params.temperature, params.top_k, params.seed) == (100, 0.8, 50, None)


def test_every_sampling_field_reaches_the_engine(http: FlaskClient, engine: EchoClient) -> None:
    wanted = {
        "temperature": 0, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "seed": 42, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5,
    }  # fmt: skip
    answer = post(http, {"prompt": "a", "max_length": 2, "stop": "q", "logit_bias": {"3": -100}, **wanted})
    assert answer.status_code == 200
    params = engine.generations[0].request.params
    assert {name: getattr(params, name) for name in wanted} == wanted
    assert (params.stop, params.logit_bias, params.max_tokens) == (("q",), {3: -100}, 2)


def test_text_goes_out_unescaped(http: FlaskClient) -> None:
    answer = post(http, {"prompt": "你好😀", "max_length": 3})
    assert answer.json["generated_text"] == "你好😀你好😀"
    assert "你好😀".encode() in answer.data


def test_a_stop_string_ends_the_text_and_frees_the_sequence(http: FlaskClient, engine: EchoClient) -> None:
    body = post(http, {"prompt": "abcdef", "max_length": 50, "stop": ["de", "zz"]}).json
    assert body["generated_text"] == "abcdefabc"
    assert body["finish_reason"] == "stop"
    assert body["tokens_generated"] == 5  # up to and with the one that completed the stop string
    assert engine.generations[0].aborted.is_set()


# -- streaming ------------------------------------------------------------------------------------------------


def test_streamed_pieces_make_the_same_text_and_the_last_event_is_the_whole_answer(http: FlaskClient) -> None:
    asked = {"prompt": "你好 world", "max_length": 20}
    whole = post(http, asked).json
    answer = post(http, {**asked, "stream": True})
    assert answer.mimetype == "text/event-stream"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"
    found = events(answer.data)
    assert [name for name, _ in found] == ["message"] * 21
    assert asked["prompt"] + "".join(data["text"] for _, data in found[:-1]) == whole["generated_text"]
    final = found[-1][1]
    assert {**final, "timings": 0} == {**whole, "timings": 0}
    assert "你好".encode() in answer.data


def test_silence_is_filled_with_comments(engine: EchoClient) -> None:
    engine.hold = True
    http = make_app(engine, stream_ping_s=0.05).test_client()
    answer = http.post("/generate", json={"prompt": "a", "stream": True}, buffered=False)
    chunks = iter(answer.response)
    assert next(chunks) == b": ping\n\n"
    assert next(chunks) == b": ping\n\n"
    engine.generations[0].finish("length", 0)
    assert events(b"".join(chunks))[-1][1]["finish_reason"] == "length"
    answer.close()


def test_tokens_that_are_no_text_yet_are_silence_too(engine: EchoClient) -> None:
    """A stop string that always seems to begin holds the text back, however busy the engine is."""
    engine.hold = True
    http = make_app(engine, stream_ping_s=0.05).test_client()
    answer = http.post("/generate", json={"prompt": "a", "stream": True, "stop": "a" * 1000}, buffered=False)
    generation = engine.generations[0]
    chunks = iter(answer.response)
    assert next(chunks) == b": ping\n\n"
    fed = threading.Event()

    def feed() -> None:
        while not fed.wait(0.01):
            generation.events.put(Tokens(generation.request.prompt_token_ids[:1]))

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert [next(chunks) for _ in range(3)] == [b": ping\n\n"] * 3
    fed.set()
    feeder.join()
    answer.close()


def test_an_error_in_mid_stream_is_a_final_error_event(engine: EchoClient) -> None:
    engine.error = "the engine process ended"
    answer = make_app(engine).test_client().post("/generate", json={"prompt": "ab", "max_length": 2, "stream": True})
    assert answer.status_code == 200  # it was already on its way
    name, data = events(answer.data)[-1]
    assert name == "error"
    assert data["code"] == "engine_died"
    assert data["request_id"] == answer.headers["X-Request-Id"]


def test_an_error_before_the_first_piece_is_a_plain_refusal_that_can_be_retried(engine: EchoClient) -> None:
    engine.hold = True
    http = make_app(engine).test_client()
    original = engine.submit

    def submit(request: Any, *, engine: Any = None) -> Any:
        generation = original(request)
        generation.finish("error", 0, "the engine process ended")
        return generation

    engine.submit = submit  # type: ignore[method-assign]
    answer = http.post("/generate", json={"prompt": "ab", "stream": True})
    assert (answer.status_code, answer.json["code"]) == (503, "engine_died")
    assert answer.headers["Retry-After"] == "1"


def test_a_closed_stream_ends_its_sequence_even_before_the_first_byte(engine: EchoClient) -> None:
    engine.hold = True
    http = make_app(engine, stream_ping_s=0.05).test_client()
    answer = http.post("/generate", json={"prompt": "a", "stream": True}, buffered=False)
    answer.close()
    assert engine.generations[0].aborted.is_set()


# -- the engine says no -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [(QueueFull("busy"), "queue_full"), (EngineDied("gone"), "engine_died"), (EngineLoading("soon"), "loading")],
)
def test_a_refusal_by_the_engine_can_be_retried(engine: EchoClient, error: Exception, code: str) -> None:
    engine.refuse = error
    answer = make_app(engine).test_client().post("/generate", json={"prompt": "a"})
    assert (answer.status_code, answer.json["code"]) == (503, code)
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_text_that_its_grammar_cannot_go_on_with_is_the_requests_fault(engine: EchoClient) -> None:
    engine.error = "grammar: The grammar cannot be followed: no token goes on with the text"
    answer = make_app(engine).test_client().post("/generate", json={"prompt": "a"})
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_request")
    assert "no token goes on with the text" in answer.json["error"]


@pytest.mark.parametrize("state", ["loading", "draining", "unhealthy"])
def test_without_a_ready_engine_the_answer_is_503(engine: EchoClient, state: EngineState) -> None:
    engine.status = replace(engine.status, state=state)
    answer = make_app(engine).test_client().post("/generate", json={"prompt": "a"})
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_worker_with_all_places_taken_says_so_at_once(engine: EchoClient) -> None:
    engine.hold = True
    http = make_app(engine, http_threads=1, stream_ping_s=0.05).test_client()
    held = http.post("/generate", json={"prompt": "a", "stream": True}, buffered=False)
    assert http.post("/generate", json={"prompt": "a"}).json["code"] == "queue_full"
    held.close()
    engine.hold = False
    assert http.post("/generate", json={"prompt": "a"}).status_code == 200


def test_an_unexpected_error_is_a_500_in_our_shape_and_tells_nothing(
    engine: EchoClient, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuse = KeyError("the secret prompt")
    answer = make_app(engine).test_client().post("/generate", json={"prompt": "a"})
    assert answer.status_code == 500
    assert answer.json["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "KeyError" in caplog.text
    assert "web_support.py" in caplog.text  # where it came from
    assert "secret prompt" not in caplog.text


def test_a_flood_is_refused_without_asking_the_engine_each_time(engine: EchoClient) -> None:
    """Under ten times the capacity refusals are most of the work. Who found a long queue full is told so at once for a
    moment; others are still asked for, and so is everybody behind a short queue."""
    engine.refuse = QueueFull("The server is busy.")
    asked = []
    original = engine.submit
    engine.submit = lambda *a, **k: asked.append(1) or original(*a, **k)  # type: ignore[method-assign]
    http = make_app(engine, max_queue=64).test_client()
    answers = [http.post("/generate", json={"prompt": "abc"}) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json["code"] for answer in answers} == {"queue_full"}
    assert len(asked) == 1
    assert http.post("/generate", json={"prompt": "abc"}, environ_base={"REMOTE_ADDR": "10.0.0.9"}).status_code == 503
    assert len(asked) == 2
    short = make_app(engine, max_queue=2).test_client()
    for _ in range(2):
        short.post("/generate", json={"prompt": "abc"})
    assert len(asked) == 4
