"""The official ``openai`` client against a real server: what it asks for it gets, and it understands the refusals."""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
import requests
from http_support import BIN, ENDLESS, GUNICORN, Server, running, wait_for
from support import ROOT

from nanogpt.web.openai.answers import ChatAnswer, CompletionAnswer


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


KEY = "k"


@pytest.fixture(scope="module")
def endless(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a GPT-2 with a key, whose texts go on until somebody ends them."""
    environment = {
        **ENDLESS,
        "API_KEY": KEY,
        "NANOGPT_MAX_TOKENS_PER_REQUEST": "10000000",
        "MODEL_CHECKPOINT": str(shared / "checkpoints" / "02_nanogpt_bpe"),
    }
    with running(
        [str(BIN / "gunicorn"), *GUNICORN[1:]], tmp_path_factory.mktemp("endless"), environment, ROOT
    ) as server:
        yield server


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": "default", "prompt": "ROMEO:", "max_tokens": 12, "seed": 1, **fields})


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "Who are you?"}]
    return client.chat.completions.create(**{"model": "default", "messages": messages, "seed": 1, **fields})


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert client.models.retrieve("default").id == model.id
    assert complete(client, model=model.id).model == model.id


def test_answers_are_as_described(server: Server) -> None:
    """Every field, and no other: clients of typed languages read them strictly."""
    for path, answer, body in (
        ("completions", CompletionAnswer, {"prompt": "a", "logprobs": 2, "echo": True, "n": 2}),
        ("chat/completions", ChatAnswer, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}),
        ("chat/completions", ChatAnswer, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5,
                                          "logprobs": True, "top_logprobs": 3}),
    ):  # fmt: skip
        answer.model_validate(requests.post(f"{server.url}/v1/{path}", json=body, timeout=60).json())


def test_a_completion(client: openai.OpenAI) -> None:
    answer = complete(client)
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, len(choice.text)) == (0, "length", 12)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 12, 18)
    assert complete(client).choices[0].text == choice.text, "the same seed, the same text"
    assert complete(client, seed=2).choices[0].text != choice.text


def test_choice_i_is_the_text_of_the_seed_plus_i(client: openai.OpenAI) -> None:
    choices = complete(client, n=3, seed=2**64 - 2).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    alone = [complete(client, seed=seed).choices[0].text for seed in (2**64 - 2, 2**64 - 1, 0)]
    assert [choice.text for choice in choices] == alone


def test_a_list_of_prompts_is_answered_in_its_order(client: openai.OpenAI) -> None:
    prompts = ["ROMEO:", "JULIET:", "KING"]
    choices = complete(client, prompt=prompts, n=2).choices
    assert [choice.index for choice in choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        assert choices[2 * i].text == complete(client, prompt=prompt).choices[0].text


def test_token_ids_are_the_text_that_they_stand_for(client: openai.OpenAI, server: Server) -> None:
    def tokens(text: str) -> list[int]:
        found: list[int] = requests.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=30).json()["tokens"]
        return found

    expected = [complete(client, prompt=text).choices[0].text for text in ("ROMEO:", "KING")]
    assert complete(client, prompt=tokens("ROMEO:"), echo=True).choices[0].text == "ROMEO:" + expected[0]
    choices = complete(client, prompt=[tokens("ROMEO:"), tokens("KING")]).choices
    assert [choice.text for choice in choices] == expected
    answer = requests.post(f"{server.url}/detokenize", json={"tokens": tokens("KING\n")}, timeout=30)
    assert answer.json() == {"prompt": "KING\n"}


def test_all_texts_of_a_request_are_computed_together(endless: Server) -> None:
    """A list is one batched call: all sixteen are in the engine at once, and leave it at once with their client."""
    with endless.engine() as engine, openai.OpenAI(base_url=f"{endless.url}/v1", api_key=KEY) as client:
        stream = complete(client, prompt=["ROMEO:"] * 8, n=2, max_tokens=500_000, stream=True)
        seen: set[int] = set()
        for chunk in stream:
            seen.add(chunk.choices[0].index)
            if len(seen) == 16:
                break
        wait_for(lambda: engine.state().num_running == 16, 30, "all texts run")
        stream.close()
        wait_for(lambda: engine.state().num_running == 0, 30, "nobody waits for them any more")


def test_stop_bias_and_penalties_reach_the_sampler(client: openai.OpenAI, server: Server) -> None:
    text = complete(client, temperature=0, max_tokens=30).choices[0].text
    stop = text[10:14]
    stopped = complete(client, temperature=0, max_tokens=30, stop=[stop, "never"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    answer = requests.post(f"{server.url}/tokenize", json={"prompt": "a"}, timeout=30).json()
    letter = answer["tokens"][0]
    assert set(complete(client, logit_bias={letter: 100}).choices[0].text) == {"a"}
    penalised = complete(client, logit_bias={letter: 100}, frequency_penalty=2, max_tokens=60, presence_penalty=2)
    assert set(penalised.choices[0].text) != {"a"}
    for ours in ({"top_k": 1}, {"min_p": 1.0}):
        assert complete(client, max_tokens=30, extra_body=ours).choices[0].text == text, "the likeliest every time"
    assert complete(client, temperature=0, max_tokens=30, extra_body={"repetition_penalty": 5}).choices[0].text != text


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3, temperature=0).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == list(range(12)), "a character is a token here"
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())
    sampled = complete(client, logprobs=0, temperature=2).choices[0].logprobs
    assert [list(top) for top in sampled.top_logprobs] == [[token] for token in sampled.tokens]


def test_echo_gives_the_prompts_logprobs(client: openai.OpenAI) -> None:
    """max_tokens 0 judges a text without going on: the same numbers as when the model writes it itself."""
    written = complete(client, logprobs=1, temperature=0)
    text = "ROMEO:" + written.choices[0].text
    judged = complete(client, prompt=text, echo=True, logprobs=1, max_tokens=0)
    (choice,) = judged.choices
    assert (choice.text, choice.finish_reason, judged.usage.completion_tokens) == (text, "length", 0)
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(text)
    assert choice.logprobs.text_offset == list(range(len(text)))
    assert choice.logprobs.token_logprobs[6:] == pytest.approx(written.choices[0].logprobs.token_logprobs, abs=1e-3)
    whole = complete(client, echo=True, logprobs=1, temperature=0).choices[0]
    assert whole.text == text
    assert whole.logprobs.tokens == list(text)


def test_the_best_of_several(client: openai.OpenAI) -> None:
    """By the mean log probability; all that was generated is counted."""

    def mean(choice: Any) -> float:
        values: list[float] = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    every = complete(client, n=6, logprobs=0, temperature=1.5).choices
    best = complete(client, n=2, best_of=6, logprobs=0, temperature=1.5)
    ranked = sorted(every, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage.completion_tokens == 6 * 12


def test_every_chunk_tells_the_usage_so_far_where_that_is_asked_for(client: openai.OpenAI) -> None:
    """guidellm and vLLM's own benchmark ask for this, and for texts of a fixed length."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, stream=True, stream_options=options, max_tokens=9, extra_body={"ignore_eos": True}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 9
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {chunks[-1].usage.prompt_tokens}


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = complete(client, n=3, logprobs=1)
    texts, tokens, reasons = [""] * 3, [[] for _ in range(3)], [""] * 3
    chunks = list(complete(client, n=3, logprobs=1, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == ["length"] * 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    order = [chunk.choices[0].index for chunk in chunks[:-1]]
    assert order != sorted(order), "the choices come as they are written, not one after the other"
    echoed = complete(client, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == "ROMEO:" + whole.choices[0].text


def test_a_stream_ends_with_done(server: Server) -> None:
    body = {"prompt": "ROMEO:", "max_tokens": 3, "stream": True}
    answer = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    *events, done = [line[6:] for line in answer.text.split("\n") if line]
    assert done == "[DONE]"
    assert all("usage" not in json.loads(event) for event in events), "nobody asked for it"


def test_a_chat(client: openai.OpenAI) -> None:
    """The embedded model was taught no form: the answer is what a transcript goes on with, stripped as in the CLI."""
    answer = chat(client, max_completion_tokens=40, logprobs=True, top_logprobs=2, n=2)
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content == choice.message.content.strip()
        assert "\nUser:" not in choice.message.content
        for token in choice.logprobs.content:
            assert bytes(token.bytes).decode() == token.token
            assert len(token.top_logprobs) == 2
    assert answer.usage.prompt_tokens == len("User: Who are you?\nAssistant:")
    bounded = chat(client)
    assert bounded.usage.completion_tokens > 40, "without a limit: what the context admits"


def test_a_conversation_goes_on_with_the_message_that_was_answered(client: openai.OpenAI) -> None:
    """Clients send an answer's message back as it is, with its nulls, and content in parts."""
    said = chat(client, max_tokens=10).choices[0].message
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        said,
        {"role": "user", "content": parts},
    ]
    answer = chat(client, messages=messages, max_tokens=5)
    written = f"Be brief.\n\nUser: Who are you?\nAssistant: {said.content}\nUser: And now?\nAssistant:"
    assert answer.usage.prompt_tokens == len(written)


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    whole = chat(client, n=2, max_tokens=30)
    texts, roles = ["", ""], ["", ""]
    for chunk in chat(client, n=2, max_tokens=30, stream=True):
        (choice,) = chunk.choices
        assert roles[choice.index] or choice.delta.role, "the role comes first"
        roles[choice.index] = choice.delta.role or roles[choice.index]
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 2
    with client.chat.completions.stream(
        model="default", messages=[{"role": "user", "content": "Who are you?"}], seed=1, max_tokens=30
    ) as stream:
        stream.until_done()
        assert stream.current_completion_snapshot.choices[0].message.content == texts[0]


def test_a_streamed_chat_whose_first_tokens_say_nothing(server: Server) -> None:
    """White space at the beginning is held back: the answer's head still comes before all of it."""
    body = {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "regex": "   [a-z]{40}",
        "stream": True,
    }
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200
    *events, done = [line[6:] for line in answer.text.split("\n") if line]
    choices = [json.loads(event)["choices"][0] for event in events]
    assert len("".join(choice["delta"].get("content") or "" for choice in choices)) == 40
    assert (choices[-1]["finish_reason"], done) == ("stop", "[DONE]")


def test_json_that_follows_a_schema(endless: Server) -> None:
    """From a model that has never seen JSON, at the highest temperature, as the client's own ``parse`` asks for it."""

    class Person(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        name: Literal["ROMEO", "JULIET"]
        old: bool

    messages: Any = [{"role": "user", "content": "Who are you?"}]
    with openai.OpenAI(base_url=f"{endless.url}/v1", api_key=KEY) as client:
        answer = client.chat.completions.parse(
            model="default", messages=messages, response_format=Person, n=3, seed=1, temperature=2, max_tokens=200
        )
        fields: Any = {"messages": messages, "max_tokens": 200, "response_format": {"type": "json_object"}}
        objects = client.chat.completions.create(model="default", **fields, seed=1).choices
    for choice in answer.choices:
        assert choice.message.parsed is not None
        assert choice.message.parsed.name in ("ROMEO", "JULIET")
        assert choice.finish_reason == "stop"
    assert objects[0].finish_reason == "length" or isinstance(json.loads(objects[0].message.content or ""), dict)


def test_a_text_that_follows_a_regular_expression(client: openai.OpenAI) -> None:
    ours = {"regex": "(yes|no), my (lord|lady)"}
    (choice,) = complete(client, extra_body=ours, temperature=2, max_tokens=60).choices
    assert re.fullmatch(ours["regex"], choice.text)
    streamed = complete(client, extra_body=ours, temperature=2, max_tokens=60, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_the_asynchronous_client(server: Server) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def streamed() -> str:
                stream = await client.completions.create(
                    model="default", prompt="ROMEO:", max_tokens=12, seed=1, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole() -> str:
                answer = await client.completions.create(model="default", prompt="ROMEO:", max_tokens=12, seed=1)
                return answer.choices[0].text

            return await asyncio.gather(*[streamed(), whole()] * 4)

    assert len(set(asyncio.run(ask()))) == 1


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "fields", "kind", "code", "param"),
    [
        (complete, {"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        (complete, {"temperature": 3}, openai.BadRequestError, "invalid_request", "temperature"),
        (complete, {"prompt": "a" * 5000}, openai.BadRequestError, "context_length_exceeded", "prompt"),
        (complete, {"prompt": "§"}, openai.BadRequestError, "unknown_character", None),
        (complete, {"prompt": [1, 99999]}, openai.BadRequestError, "invalid_request", "prompt"),
        (complete, {"prompt": ["a"] * 200}, openai.BadRequestError, "invalid_request", "prompt"),
        (complete, {"extra_body": {"regex": "("}}, openai.BadRequestError, "invalid_request", "regex"),
        (chat, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
         openai.BadRequestError, "invalid_request", "response_format"),
        (complete, {"suffix": "x"}, openai.BadRequestError, "invalid_request", "suffix"),
        (chat, {"messages": []}, openai.BadRequestError, "invalid_request", "messages"),
        (chat, {"tools": []}, openai.BadRequestError, "invalid_request", "tools"),
        (chat, {"messages": [{"role": "user", "content": "a" * 5000}]}, openai.BadRequestError,
         "context_length_exceeded", "messages"),
        (chat, {"extra_body": {"modle": "x"}}, openai.BadRequestError, "invalid_request", "modle"),
    ],
)  # fmt: skip
def test_a_refusal_is_the_clients_own_error(
    client: openai.OpenAI,
    ask: Callable[..., Any],
    fields: Any,
    kind: type[openai.APIStatusError],
    code: str,
    param: Any,
) -> None:
    with pytest.raises(kind) as caught:
        ask(client, **fields)
    assert caught.value.code == code
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_routes_methods_and_keys_are_refused_in_the_same_form(endless: Server) -> None:
    with openai.OpenAI(base_url=f"{endless.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError) as missing:
            client.with_options(api_key=KEY).embeddings.create(model="default", input="a")
        assert missing.value.code == "not_found"
        assert client.with_options(api_key=KEY).models.list().data
        answer = requests.get(f"{endless.url}/v1/completions", headers={"X-API-Key": KEY}, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
        answer = requests.post(f"{endless.url}/v1/completions", "{", headers={"X-API-Key": KEY}, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("status", [429, 503])
def test_the_client_tries_again_after_as_long_as_it_is_told(server: Server, status: int) -> None:
    """Through a proxy that refuses once, as the server does when it is full or the client is over its limit."""
    seen: list[str] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers["x-stainless-retry-count"])
            if len(seen) == 1:
                self.send_response(status)
                self.send_header("Retry-After", "1")
                answer = b'{"error": {"message": "busy", "type": "server_error", "param": null, "code": "queue_full"}}'
            else:
                answer = requests.post(server.url + self.path, body, headers={"Content-Type": "application/json"},
                                       timeout=60).content  # fmt: skip
                self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{proxy.server_port}/v1", api_key="none") as client:
                assert complete(client).choices[0].text
        finally:
            proxy.shutdown()
            thread.join()
    assert seen == ["0", "1"]
