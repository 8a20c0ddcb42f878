"""The response cache without Redis: what is kept, under which name, for whom, and how much of it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from flask.testing import FlaskClient
from web_support import EchoClient, make_app

from nanogpt.engine.status import EngineStatus
from nanogpt.errors import MissingDependency
from nanogpt.sampling_params import SamplingParams, TokenLogprobs
from nanogpt.settings import Settings
from nanogpt.web.cache import CacheStats, MemoryCache, ResponseCache
from nanogpt.web.cache_entry import Entry, _sum, size_of, unpack
from nanogpt.web.engine import fingerprint
from nanogpt.web.redis_link import Breaker


@pytest.fixture
def engine() -> EchoClient:
    client = EchoClient()
    client.status = replace(client.status, digest="a" * 64)
    return client


@pytest.fixture
def http(engine: EchoClient) -> FlaskClient:
    return make_app(engine).test_client()


def ask(http: FlaskClient, **fields: Any) -> Any:
    return http.post("/generate", json={"prompt": "abcdef", "max_length": 9, **fields})


def use(answer: Any) -> str:
    return str(answer.headers["X-Cache"])


def without_timings(answer: Any) -> dict[str, Any]:
    return {name: value for name, value in answer.json.items() if name != "timings"}


# -- what is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [{"temperature": 0}, {"seed": 7}, {"seed": -1, "temperature": 1.5}])
def test_what_must_repeat_is_computed_once(http: FlaskClient, engine: EchoClient, repeats: dict[str, Any]) -> None:
    first, second = ask(http, **repeats), ask(http, **repeats)
    assert (use(first), use(second)) == ("miss", "hit")
    assert without_timings(first) == without_timings(second)
    assert len(engine.generations) == 1


def test_what_is_drawn_anew_is_never_kept(http: FlaskClient, engine: EchoClient) -> None:
    assert [use(ask(http)) for _ in range(2)] == ["bypass", "bypass"]
    assert len(engine.generations) == 2


def test_a_client_can_do_without(http: FlaskClient, engine: EchoClient) -> None:
    """``cache: false`` neither takes what is there nor leaves anything."""
    assert use(ask(http, seed=1, cache=False)) == "bypass"
    assert use(ask(http, seed=1)) == "miss"
    assert use(ask(http, seed=1, cache=False)) == "bypass"
    assert len(engine.generations) == 3


def test_an_operator_can_do_without(engine: EchoClient) -> None:
    http = make_app(engine, response_cache=False).test_client()
    assert [use(ask(http, seed=1)) for _ in range(2)] == ["bypass", "bypass"]


def test_an_engine_that_does_not_say_what_it_serves_has_no_cache(engine: EchoClient) -> None:
    engine.status = replace(engine.status, digest=None)
    http = make_app(engine).test_client()
    assert [use(ask(http, seed=1)) for _ in range(2)] == ["bypass", "bypass"]


def test_streams_and_whole_answers_share(http: FlaskClient, engine: EchoClient) -> None:
    whole = ask(http, seed=1)
    streamed = ask(http, seed=1, stream=True)
    assert use(streamed) == "hit"
    *pieces, final = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert "abcdef" + "".join(piece["text"] for piece in pieces) == whole.json["generated_text"]
    assert {**final, "timings": 0} == {**whole.json, "timings": 0}
    assert use(ask(http, seed=2, stream=True)) == "miss"
    assert use(ask(http, seed=2)) == "hit"
    assert len(engine.generations) == 2


def test_a_stop_text_ends_the_kept_answer_as_it_ended_the_first(http: FlaskClient, engine: EchoClient) -> None:
    """The engine calls such an end ``abort``: for the text it is ``stop``, and whole."""
    first, second = (ask(http, seed=1, stop="de", max_length=50) for _ in range(2))
    assert (use(first), use(second)) == ("miss", "hit")
    assert without_timings(first) == without_timings(second)
    assert second.json["generated_text"] == "abcdefabc"
    assert second.json["finish_reason"] == "stop"


def test_a_kept_answer_says_honestly_what_it_took(http: FlaskClient) -> None:
    ask(http, seed=1)
    timings = ask(http, seed=1).json["timings"]
    assert timings["queue_s"] == 0
    assert timings["tokens_per_second"] == 0
    assert 0 < timings["ttft_s"] <= timings["total_s"]


@pytest.mark.parametrize("error", ["timeout", "the runner is lost"])
def test_what_did_not_end_well_is_not_kept(http: FlaskClient, engine: EchoClient, error: str) -> None:
    """A deadline's ``abort`` is an answer with a text, but not the whole one; an error is none."""
    engine.hold = True
    original = engine.submit

    def submit(request: Any, **more: Any) -> Any:
        generation = original(request, **more)
        generation.finish("abort" if error == "timeout" else "error", 0, error)
        return generation

    engine.submit = submit  # type: ignore[method-assign]
    assert ask(http, seed=1).status_code in (503, 504)
    engine.submit, engine.hold = original, False  # type: ignore[method-assign]
    assert use(ask(http, seed=1)) == "miss"


def test_another_model_has_other_answers(http: FlaskClient, engine: EchoClient) -> None:
    """After a reload nothing of the former model is told, and after a rollback its answers are there again."""
    ask(http, seed=1)
    former = engine.status
    engine.status = replace(former, digest="b" * 64, tokenizer=dict(former.tokenizer or {}))
    assert use(ask(http, seed=1)) == "miss"
    engine.status = former
    assert use(ask(http, seed=1)) == "hit"


def test_an_answer_by_another_engine_than_the_expected_one_is_not_kept(http: FlaskClient, engine: EchoClient) -> None:
    """A reload between the prompt's tokens and the engine's: the key names the former weights."""
    original = engine.submit

    def submit(request: Any, **more: Any) -> Any:
        generation = original(request, **more)
        generation.digest = "b" * 64  # type: ignore[attr-defined]
        return generation

    engine.submit = submit  # type: ignore[method-assign]
    assert [use(ask(http, seed=1)) for _ in range(2)] == ["miss", "miss"]


def test_the_log_and_the_header_are_for_answers_that_were_generated(http: FlaskClient) -> None:
    assert "X-Cache" not in http.get("/health").headers
    assert "X-Cache" not in ask(http, seed="no number").headers


def test_redis_is_an_extra_that_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingDependency) as caught:
        make_app(redis_url="redis://:xyzzySecret@h")
    assert "nano-gpt-api[redis]" in str(caught.value)
    assert "xyzzySecret" not in str(caught.value)


def test_after_a_failure_one_tries_again_for_all() -> None:
    breaker = Breaker("broken", "mended", cooldown_s=3600.0)
    breaker.failed("why")
    assert not breaker.admits()
    breaker._try_at = 0.0  # an hour later
    assert [breaker.admits() for _ in range(3)] == [True, False, False]
    breaker.succeeded(time.monotonic())
    assert [breaker.admits() for _ in range(3)] == [True] * 3


# -- the name ---------------------------------------------------------------------------------------------------


STATUS = EngineStatus(
    state="ready", model="m", device="cpu", precision="int8", runner="native", digest="a" * 64,
    tokenizer={"kind": "gpt2"}, card={"name": "m", "path": "/a", "n_head": 4, "activation": "gelu"},
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "b" * 64}, {"device": "cuda"}, {"precision": "fp32"}, {"runner": "torch"},
        {"tokenizer": {"kind": "characters", "characters": ["a"]}}, {"card": {"n_head": 8, "activation": "gelu"}},
        {"card": {"n_head": 4, "activation": "relu"}},
        {"card": {"n_head": 4, "activation": "gelu", "int8_matrices": ["transformer.wte"]}},
    ],
    ids=str,
)  # fmt: skip
def test_all_that_a_text_depends_on_is_in_the_fingerprint(change: dict[str, Any]) -> None:
    assert fingerprint(replace(STATUS, **change)) != fingerprint(STATUS)


def test_the_same_weights_in_another_file_have_the_same_fingerprint() -> None:
    moved = replace(STATUS, model="n", card={"activation": "gelu", "name": "n", "path": "/b", "n_head": 4})
    assert fingerprint(moved) == fingerprint(STATUS)


def key(params: SamplingParams, prompt: tuple[int, ...] = (1, 2), **settings: Any) -> bytes | None:
    return ResponseCache(Settings(**settings)).key("f", prompt, params)


def test_equal_requests_have_one_name_however_they_are_written() -> None:
    assert key(SamplingParams(temperature=1, seed=1)) == key(SamplingParams(temperature=1.0, seed=1))
    assert key(SamplingParams(seed=1, logit_bias={1: 2, 3: -1})) == key(
        SamplingParams(seed=1, logit_bias={3: -1, 1: 2})
    )
    # Nothing is drawn, so a seed says nothing.
    assert key(SamplingParams(temperature=0, seed=1)) == key(SamplingParams(temperature=0, seed=2))
    assert key(SamplingParams(temperature=0)) == key(SamplingParams(temperature=0.0, seed=2))


OTHERS: dict[str, Any] = {
    "max_tokens": 99, "logit_bias": {1: 1.0}, "repetition_penalty": 1.1, "presence_penalty": 0.5,
    "frequency_penalty": 0.5, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 2, "stop": ("a",),
    "stop_token_ids": (3,), "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 0, "grammar": "{}",
}  # fmt: skip


@pytest.mark.parametrize("name", list(SamplingParams.__dataclass_fields__))
def test_every_parameter_is_in_the_name(name: str) -> None:
    """A new parameter fails here until it has a value in OTHERS."""
    base = SamplingParams(seed=1)
    assert key(replace(base, **{name: OTHERS[name]})) != key(base)


def test_prompt_and_settings_are_in_the_name() -> None:
    params = SamplingParams(seed=1)
    names = {key(params), key(params, (1, 3)), key(params, (12,)), key(params, context_overflow="crop")}
    assert len(names) == 4


# -- memory -----------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_the_least_recently_used_entry_goes() -> None:
    stats = CacheStats()
    memory = MemoryCache(3 * (100 + 300), stats)
    for name in b"abc":
        memory.put(bytes([name]), b"x" * 100, 60)
    assert memory.get(b"a") is not None
    memory.put(b"d", b"x" * 100, 60)
    assert [name for name in (b"a", b"b", b"c", b"d") if memory.get(name) is None] == [b"b"]
    assert (stats.entries, stats.bytes) == (3, 3 * 400)
    memory.put(b"a", b"x" * 50, 60)  # the same name again is no second entry
    assert (stats.entries, stats.bytes) == (3, 3 * 400 - 50)
    memory.put(b"e", b"x" * 1000, 60)
    assert memory.get(b"e") is None
    assert stats.entries == 3


def test_an_entry_has_an_end() -> None:
    stats = CacheStats()
    memory = MemoryCache(10_000, stats)
    memory.put(b"a", b"x", 0)
    assert memory.get(b"a") is None
    assert (stats.entries, stats.bytes) == (0, 0)


def test_an_answer_that_is_too_large_is_given_and_not_kept(engine: EchoClient) -> None:
    http = make_app(engine, cache_entry_bytes=64).test_client()
    answers = [ask(http, seed=1, max_length=100) for _ in range(2)]
    assert [use(answer) for answer in answers] == ["miss", "miss"]
    assert [answer.json["tokens_generated"] for answer in answers] == [100, 100]


# -- what is stored ---------------------------------------------------------------------------------------------


PARAMS = SamplingParams(max_tokens=5, seed=1, logprobs=2, prompt_logprobs=1)
TOP = TokenLogprobs(-0.5, 1, [(7, -0.5), (70_000, float("-inf"))])
ENTRY = Entry("stop", 3, 2, [7, 70_000], [TOP, TOP], [None, TOP, TOP])
KEY = b"k" * 32


def test_an_entry_comes_back_as_it_was() -> None:
    assert unpack(ENTRY.pack(KEY), KEY, 3, PARAMS) == ENTRY
    plain = Entry("length", 3, 0, [])
    assert unpack(plain.pack(KEY), KEY, 3, SamplingParams(seed=1)) == plain


def test_the_estimate_of_an_entrys_size_is_never_too_small() -> None:
    assert sum(size_of(event) for event in ENTRY.events()) >= len(ENTRY.pack(KEY))


def test_an_entry_that_was_damaged_or_is_another_requests_is_refused() -> None:
    data = ENTRY.pack(KEY)
    wrong = [data[:end] for end in range(len(data))] + [data + b"\0"]
    wrong += [data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]
              for index in range(len(data)) for bit in range(8)]  # fmt: skip
    for changed in wrong:
        with pytest.raises(ValueError):
            unpack(changed, KEY, 3, PARAMS)
    with pytest.raises(ValueError):
        unpack(data, b"l" * 32, 3, PARAMS)


def test_the_smallest_entry_is_taken() -> None:
    """Of its changes the next test is made."""
    data = msgpack.packb([1, "stop", 3, 0, [1], None, None])
    assert unpack(_sum(data, KEY) + data, KEY, 3, SamplingParams(max_tokens=5, seed=1)).token_ids == [1]


@pytest.mark.parametrize(
    "values",
    [
        None, 5, [], {}, [1, "stop", 3, 0, [1], None], [2, "stop", 3, 0, [1], None, None],
        [1, "abort", 3, 0, [1], None, None], [1, [], 3, 0, [1], None, None], [1, "stop", 4, 0, [1], None, None],
        [1, "stop", 3, 4, [1], None, None], [1, "stop", 3, True, [1], None, None], [1, "stop", 3, 0, [-1], None, None],
        [1, "stop", 3, 0, [2**31], None, None], [1, "stop", 3, 0, [1.0], None, None],
        [1, "stop", 3, 0, "a", None, None],
        [1, "stop", 3, 0, [1] * 6, None, None], [1, "stop", 3, 0, [1], [], None], [1, "stop", 3, 0, [1], None, []],
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_entry_is_refused_though_its_sum_is_right(values: Any) -> None:
    data = msgpack.packb(values)
    with pytest.raises(ValueError):
        unpack(_sum(data, KEY) + data, KEY, 3, SamplingParams(max_tokens=5, seed=1))
