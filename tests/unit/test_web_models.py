"""Two models on one server, with engines that only echo: who is asked for by which name, and what routes make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from web_support import EchoClient, make_app

from nanogpt.engine.stats import EngineStats
from nanogpt.keys import add_key
from nanogpt.tokenizer import characters

FIRST, SECOND = "1" * 64, "2" * 64


def pair(second: str = "second", **settings: Any) -> tuple[Any, EchoClient, EchoClient]:
    """A server, and its two engines. The second model knows fewer characters, and writes upper case alone."""
    one, two = EchoClient(), EchoClient()
    one.status = replace(one.status, model="first", digest=FIRST)
    two.status = replace(two.status, model=second, digest=SECOND, tokenizer=characters(list("ABC")).to_spec())
    return make_app(one, two, **settings).test_client(), one, two


@pytest.mark.parametrize(
    ("name", "model"), [(None, "first"), ("default", "first"), ("first", "first"), ("second", "second"),
                        ("compare", "second"), ("", "first")],
)  # fmt: skip
def test_each_name_has_its_engine(name: str | None, model: str) -> None:
    http, one, two = pair()
    body = {"prompt": "AB", "max_length": 3, **({} if name is None else {"model": name})}
    answer = http.post("/generate", json=body).json
    assert (answer["model"], answer["generated_text"]) == (model, "ABABA")
    assert [len(one.generations), len(two.generations)] == ([1, 0] if model == "first" else [0, 1])
    ids = (two if model == "second" else one).generations[0].request.prompt_token_ids
    assert list(ids) == ([0, 1] if model == "second" else list(ids)), "tokens of that model's own tokenizer"
    for path, more in (("completions", {"prompt": "AB"}), ("completions", {"prompt": ["AB", "C"], "n": 2})):
        told = http.post(f"/v1/{path}", json={**more, "max_tokens": 2, "model": name or "default"}).json
        assert told["model"] == model


def test_another_name_is_refused_and_the_served_ones_are_named() -> None:
    http, one, two = pair()
    refused = http.post("/generate", json={"prompt": "AB", "model": "third"})
    assert (refused.status_code, refused.json["code"], refused.json["field"]) == (404, "model_not_found", "model")
    assert refused.json["remedy"].startswith("This server serves 'first' and 'second';")
    for path in ("/v1/models/third", "/model_info?model=third", "/tokenizer_info?model=third"):
        assert http.get(path).status_code == 404
    assert not one.generations + two.generations
    alone = make_app().test_client()
    refused = alone.post("/generate", json={"prompt": "AB", "model": "compare"})
    assert (refused.status_code, refused.json["remedy"][:26]) == (404, "This server serves 'echo';")


def test_both_are_listed_and_described() -> None:
    http, _, _ = pair()
    listed = http.get("/v1/models").json["data"]
    assert [(model["id"], model["digest"]) for model in listed] == [("first", FIRST), ("second", SECOND)]
    assert http.get("/v1/models/compare").json["id"] == "second"
    assert http.get("/model_info?model=second").json["digest"] == SECOND
    assert http.get("/model_info").json["digest"] == FIRST
    assert http.get("/tokenizer_info?model=second").json["vocab_size"] == 3
    assert http.post("/tokenize", json={"prompt": "CA", "model": "second"}).json["tokens"] == [2, 0]
    assert http.post("/detokenize", json={"tokens": [2, 0], "model": "second"}).json["prompt"] == "CA"


@pytest.mark.parametrize("name", ["first", "default"])
def test_of_two_with_one_name_the_second_is_told_by_its_weights(name: str) -> None:
    """nanoGPT calls every checkpoint ckpt.pt; and ``default`` is the first one's, whatever a file is called."""
    http, _, two = pair(second=name)
    assert [model["id"] for model in http.get("/v1/models").json["data"]] == ["first", f"{name}@22222222"]
    for asked in (f"{name}@22222222", "compare"):
        assert http.post("/generate", json={"prompt": "AB", "model": asked}).json["model"] == f"{name}@22222222"
    assert len(two.generations) == 2
    assert http.post("/generate", json={"prompt": "AB", "model": name}).json["model"] == "first"


def test_a_first_model_that_is_called_compare_keeps_its_name() -> None:
    http, one, _ = pair()
    one.status = replace(one.status, model="compare")
    assert http.post("/generate", json={"prompt": "AB", "model": "compare"}).json["model"] == "compare"
    assert len(one.generations) == 1


def test_either_model_answers_while_the_other_is_down() -> None:
    """The second is extra: the server's own health is the first one's."""
    http, one, two = pair()
    two.status = replace(two.status, state="unhealthy", reason="The file is damaged.")
    assert http.get("/health").json == {
        "status": "healthy", "model_loaded": True, "device": "cpu", "compare": "unhealthy",
    }  # fmt: skip
    assert http.get("/ready").status_code == 200
    assert http.post("/generate", json={"prompt": "AB"}).status_code == 200
    down = http.post("/generate", json={"prompt": "AB", "model": "second"})
    assert (down.status_code, down.json["code"]) == (503, "unhealthy")
    assert "The file is damaged." in down.json["error"]
    assert [model["id"] for model in http.get("/v1/models").json["data"]] == ["first"]
    one.status, two.status = replace(one.status, state="loading"), replace(two.status, state="ready", reason="")
    assert http.get("/health").status_code == 503
    assert http.post("/generate", json={"prompt": "AB", "model": "second"}).status_code == 200
    assert http.post("/generate", json={"prompt": "AB"}).status_code == 503
    assert http.post("/generate", json={"prompt": "AB", "model": "third"}).status_code == 503, "it may be its name"


def test_answers_of_one_model_are_never_the_others() -> None:
    http, one, two = pair()
    body = {"prompt": "AB", "max_length": 4, "temperature": 0}
    uses = [
        http.post("/generate", json={**body, "model": name}).headers["X-Cache"]
        for name in ("first", "second", "default", "compare")
    ]
    assert uses == ["miss", "miss", "hit", "hit"]
    assert [len(one.generations), len(two.generations)] == [1, 1]


def test_limits_are_the_clients_whichever_model_it_asks(tmp_path: Any) -> None:
    secret = add_key(tmp_path / "keys.json", "k", {"requests_per_minute": 2, "tokens_per_minute": 100})
    http, _, _ = pair(keys_file=str(tmp_path / "keys.json"))
    codes = [
        http.post("/generate", json={"prompt": "AB", "max_length": 2, "model": name}, headers={"X-API-Key": secret})
        for name in ("first", "second", "second")
    ]
    assert [answer.status_code for answer in codes] == [200, 200, 429]


def test_metrics_tell_the_engines_apart() -> None:
    http, one, two = pair(second="first")
    one.status = replace(one.status, stats={**EngineStats(num_slots=4).to_wire(), "num_output_tokens": 5})
    two.status = replace(two.status, stats={**EngineStats(num_slots=4).to_wire(), "num_output_tokens": 7}, restarts=3)
    samples = [
        sample for family in text_string_to_metric_families(http.get("/metrics").text) for sample in family.samples
    ]
    tokens = {s.labels["model_name"]: s.value for s in samples if s.name == "nanogpt_generation_tokens_total"}
    assert tokens == {"first": 5, "first@22222222": 7}
    assert {s.labels["digest"] for s in samples if s.name == "nanogpt_model_info"} == {FIRST, SECOND}
    assert [s.value for s in samples if s.name == "nanogpt_compare_engine_restarts_total"] == [3]
    series = [(s.name, tuple(sorted(s.labels.items()))) for s in samples]
    assert len(series) == len(set(series)), "no series twice"
    assert "compare" not in make_app(EchoClient()).test_client().get("/metrics").text


def test_a_second_model_cannot_be_changed_where_there_is_none() -> None:
    http = make_app(admin_key="a").test_client()
    refused = http.post("/admin/reload", json={"checkpoint": "x", "compare": True}, headers={"X-API-Key": "a"})
    assert (refused.status_code, refused.json["code"], refused.json["field"]) == (409, "reload_conflict", "compare")
    assert "COMPARE_CHECKPOINT" in refused.json["remedy"]
