"""What a server on the internet is sent: every wrong request is a 4xx in one shape that says what to send instead."""

from __future__ import annotations

import io
import json
import socket
from dataclasses import replace
from typing import Any

import pytest
from flask import Response
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web_support import ALPHABET, EchoClient, make_app
from werkzeug.test import create_environ, run_wsgi_app

from nanogpt.engine.messages import EngineState
from nanogpt.web.openapi import openapi_path
from nanogpt.web.playground_routes import FILES_ROUTE

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def http() -> FlaskClient:
    return make_app(EchoClient()).test_client()


def check_shape(answer: Any) -> dict[str, Any]:
    """The one shape of a refusal."""
    body: dict[str, Any] = json.loads(answer.data)
    assert {"error", "code", "request_id"} <= set(body) <= {"error", "code", "request_id", "field", "remedy"}
    assert all(isinstance(value, str) and value for value in body.values())
    assert answer.mimetype == "application/json"
    assert answer.headers["X-Request-Id"] == body["request_id"]
    return body


def refused(http: FlaskClient, body: Any, status: int = 400) -> dict[str, Any]:
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    answer = http.post("/generate", data=data, headers=JSON)
    assert answer.status_code == status, answer.text
    return check_shape(answer)


# -- the guide's own messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": None}, {"max_length": 10_000}, {"text": "a"}])
def test_prompt_is_required(http: FlaskClient, body: Any) -> None:
    said = refused(http, body)
    assert (said["error"], said["field"]) == ("Prompt is required", "prompt")


def test_prompt_too_long(http: FlaskClient) -> None:
    assert refused(http, {"prompt": "a" * 1001})["error"] == "Prompt too long"
    assert http.post("/generate", json={"prompt": "界" * 1000, "max_length": 1}).status_code == 200


def test_max_length_too_large(http: FlaskClient) -> None:
    said = refused(http, {"prompt": "a", "max_length": 501})
    assert (said["error"], said["field"]) == ("max_length too large", "max_length")
    assert http.post("/generate", json={"prompt": "a", "max_length": 500}).status_code == 200


def test_the_limits_are_settings() -> None:
    http = make_app(max_prompt_chars=3, max_new_tokens=5).test_client()
    assert refused(http, {"prompt": "abcd"})["error"] == "Prompt too long"
    assert "5" in refused(http, {"prompt": "abc", "max_length": 6})["remedy"]


def test_a_misspelt_prompt_is_recognised(http: FlaskClient) -> None:
    assert refused(http, {"promt": "a"})["remedy"] == "Did you mean prompt?"


# -- fields -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", 5, "a text, not 5"),
        ("prompt", ["a"], "a text, not a list"),
        ("max_length", "5", "an integer, not '5'"),
        ("max_length", 5.0, "an integer, not 5.0"),
        ("max_length", True, "an integer, not true"),
        ("max_length", None, "an integer, not null"),
        ("max_length", 0, "at least 1, not 0"),
        ("temperature", "hot", "a number, not 'hot'"),
        ("temperature", 2.1, "between 0 and 2, not 2.1"),
        ("temperature", -0.1, "between 0 and 2, not -0.1"),
        ("top_k", -1, "between 0 and 2147483647, not -1"),
        ("top_k", 1.5, "an integer, not 1.5"),
        ("top_p", 1.01, "between 0 and 1, not 1.01"),
        ("min_p", -1, "between 0 and 1, not -1"),
        ("seed", 2**64, "between -9223372036854775808 and 18446744073709551615"),
        ("stop", "", "not empty"),
        ("stop", ["a", ""], "not empty"),
        ("stop", 5, "a text or a list of texts, not 5"),
        ("stop", ["a"] * 17, "at most 16"),
        ("repetition_penalty", 0, "between 0.01 and 100, not 0"),
        ("presence_penalty", [], "a number, not a list"),
        ("frequency_penalty", 101, "between -100 and 100, not 101"),
        ("logit_bias", {"five": 1}, "token ids"),
        ("logit_bias", {"5": 101}, "at most 100, not 101"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "at most 1024 entries, not 1025"),
        ("logit_bias", [5], "an object of token ids and numbers, not a list"),
        ("stream", 1, "true or false, not 1"),
        ("stream", "true", "true or false, not 'true'"),
    ],
)
def test_a_wrong_value_is_named_with_its_limit(http: FlaskClient, field: str, value: Any, says: str) -> None:
    said = refused(http, {"prompt": "a", field: value})
    assert said["field"] == field
    assert said["error"].startswith(field)
    assert says in said["error"]


@pytest.mark.parametrize(
    ("field", "meant"),
    [("temprature", "temperature"), ("Top_K", "top_k"), ("max_tokens", "max_length"), ("stop_sequences", "stop")],
)
def test_an_unknown_field_is_named_with_the_nearest(http: FlaskClient, field: str, meant: str) -> None:
    said = refused(http, {"prompt": "a", field: 1})
    assert (said["field"], said["remedy"]) == (field, f"Did you mean {meant}?")


def test_a_character_outside_the_vocabulary_is_named_with_its_place(http: FlaskClient) -> None:
    said = refused(http, {"prompt": "abc§"})
    assert said["code"] == "unknown_character"
    assert "§" in said["error"]


# -- bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b"prompt=a", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": "a"} x', "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "\\uDFFF": 1}', "surrogate"),
        (b'["prompt"]', "object, not a list"),
        (b'"prompt"', "object, not a text"),
        (b"null", "object, not null"),
        (b"5", "object, not a number"),
        (b'{"prompt": "a", "max_length": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 50_000, "nested"),
        (b'{"prompt": "a\nb"}', "not JSON"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_body_that_is_no_json_object_is_refused(http: FlaskClient, body: bytes, says: str) -> None:
    assert says in refused(http, body)["error"]


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", '"utf-8"', "utf-16", "utf-32", "gbk", "gb18030", "utf-16-le"])
def test_a_body_is_read_in_its_charset(http: FlaskClient, charset: str) -> None:
    body = json.dumps({"prompt": "你好世界", "max_length": 1}, ensure_ascii=False).encode(charset.strip('"'))
    answer = http.post("/generate", data=body, content_type=f"application/json; charset={charset}")
    assert answer.json["prompt"] == "你好世界"


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32-be"])
def test_without_a_charset_the_bytes_tell(http: FlaskClient, codec: str) -> None:
    body = json.dumps({"prompt": "é", "max_length": 1}, ensure_ascii=False).encode(codec)
    assert http.post("/generate", data=body, headers=JSON).json["prompt"] == "é"


def test_latin_1_is_not_taken_for_utf_8(http: FlaskClient) -> None:
    body = '{"prompt": "é", "max_length": 1}'.encode("latin-1")
    assert http.post("/generate", data=body, content_type="application/json; charset=iso-8859-1").json["prompt"] == "é"
    assert "not UTF-8" in refused(http, body)["error"]


@pytest.mark.parametrize(
    "charset",
    ["klingon", "zlib", "hex", "rot13", "unicode_escape", "punycode", "idna", "undefined", "os.path", "a" * 99],
)
def test_what_is_no_charset_is_a_415(http: FlaskClient, charset: str) -> None:
    answer = http.post("/generate", data=b"{}", content_type=f"application/json; charset={charset}")
    assert answer.status_code == 415
    check_shape(answer)


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "text/plain", "multipart/form-data"]
)
def test_another_content_type_is_told_which_header_to_send(http: FlaskClient, content_type: str | None) -> None:
    """``curl -d`` says that it sends a form."""
    answer = http.post("/generate", data=b'{"prompt": "a"}', content_type=content_type)
    assert answer.status_code == 415
    assert "Content-Type: application/json" in check_shape(answer)["remedy"]


def test_too_large_a_body_is_not_read() -> None:
    http = make_app(max_body_bytes=2000).test_client()
    unread = io.BytesIO(b"x" * 2001)
    answer = http.post("/generate", input_stream=unread, content_length=2001, headers=JSON)
    assert answer.status_code == 413
    check_shape(answer)
    assert unread.tell() == 0


def test_a_body_in_chunks_is_bounded_too() -> None:
    http = make_app(max_body_bytes=2000).test_client()
    for size, status in ((2000, 400), (2001, 413), (10_000_000, 413)):
        stream = io.BytesIO(b"x" * size)
        answer = http.post(
            "/generate", input_stream=stream, headers=JSON, environ_overrides={"wsgi.input_terminated": True}
        )
        assert answer.status_code == status
        assert stream.tell() <= 2001


def test_a_body_shorter_than_it_says_is_refused(http: FlaskClient) -> None:
    answer = http.post("/generate", input_stream=io.BytesIO(b'{"prompt"'), content_length=100, headers=JSON)
    assert answer.status_code == 400
    check_shape(answer)


def test_a_body_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.web.body.SOCKET_TIMEOUT_S", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb", buffering=0) as stream:
        theirs.sendall(b'{"prompt"')
        environ = {"wsgi.input": stream, "CONTENT_LENGTH": "100", "gunicorn.socket": ours}
        answer = make_app().test_client().post("/generate", headers=JSON, environ_overrides=environ)
    assert answer.status_code == 400
    assert "did not arrive" in check_shape(answer)["error"]


# -- routes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "BREW"])
def test_a_wrong_method_is_told_the_right_one(http: FlaskClient, method: str) -> None:
    answer = http.open("/generate", method=method)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST"
    if method != "HEAD":
        check_shape(answer)


@pytest.mark.parametrize(
    "path", ["/nothing", "/generate/", "//generate", "/Generate", "/health/x", "/%2e%2e/etc", "/\0"]
)
def test_an_unknown_route_is_a_404(http: FlaskClient, path: str) -> None:
    answer = http.post(path, json={"prompt": "a"})
    assert answer.status_code == 404
    check_shape(answer)


def test_the_index_lists_the_routes_that_there_are(http: FlaskClient) -> None:
    listed = {entry.split()[1] for entry in http.get("/").json["routes"]}
    there = {openapi_path(rule.rule) for rule in http.application.url_map.iter_rules()}
    assert listed == there - {"/", openapi_path(FILES_ROUTE)}


# -- health -----------------------------------------------------------------------------------------------------


def test_health_is_the_guides() -> None:
    answer = make_app().test_client().get("/health")
    assert answer.status_code == 200
    assert answer.json == {"status": "healthy", "model_loaded": True, "device": "cpu"}


@pytest.mark.parametrize("state", ["loading", "draining", "unhealthy"])
def test_health_and_ready_say_what_is_wrong(state: EngineState) -> None:
    engine = EchoClient()
    engine.status = replace(engine.status, state=state, reason="because")
    http = make_app(engine).test_client()
    answer = http.get("/health")
    assert answer.status_code == 503
    assert answer.json == {"status": state, "model_loaded": False, "device": "cpu", "reason": "because"}
    answer = http.get("/ready")
    assert (answer.status_code, answer.json) == (503, {"ready": False, "reason": "because"})


def test_ready() -> None:
    answer = make_app().test_client().get("/ready")
    assert (answer.status_code, answer.json) == (200, {"ready": True})


# -- anything at all --------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.text(ALPHABET, max_size=9)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
fields = st.sampled_from(
    ["prompt", "max_length", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "stream", "logit_bias"]
)
bodies = st.dictionaries(fields | st.text(max_size=12), values, max_size=8).map(json.dumps)
near_misses = st.builds(
    lambda field, value: json.dumps({"prompt": "abc", "max_length": 3, field: value}), fields, values
)
anything = bodies | near_misses | values.map(json.dumps) | st.binary(max_size=200)


@given(body=anything)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_gets_anything_but_an_answer_or_a_refusal(http: FlaskClient, body: str | bytes) -> None:
    answer = http.post("/generate", data=body, headers=JSON)
    if answer.status_code == 200:
        if answer.mimetype == "application/json":
            assert answer.json["generated_text"].startswith(answer.json["prompt"])
    else:
        assert 400 <= answer.status_code < 500
        check_shape(answer)


@given(
    path=st.text(max_size=20).map(lambda text: "/" + text),
    method=st.sampled_from(["GET", "POST", "PUT", "OPTIONS", "X"]),
    content_type=st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40),
    request_id=st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=200),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_address_or_header_gets_anything_but_an_answer_or_a_refusal(
    http: FlaskClient, path: str, method: str, content_type: str, request_id: str
) -> None:
    # As a server hands it over; the test client would mend it first, or refuse it itself.
    environ = create_environ(method=method, data=b"{}")
    environ |= {"PATH_INFO": path.encode().decode("latin-1"), "CONTENT_TYPE": content_type}
    environ |= {"HTTP_X_REQUEST_ID": request_id, "HTTP_HOST": request_id, "HTTP_AUTHORIZATION": request_id}
    body, status, headers = run_wsgi_app(http.application, environ, buffered=True)
    answer = Response(body, status, headers)
    assert answer.status_code < 500
    if answer.status_code >= 400 and path != "/v1":  # that one is OpenAI's: tests/unit/test_openai*
        check_shape(answer)
