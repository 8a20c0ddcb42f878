"""A front without a cluster: what is sent again, what is told, and which replica a prompt goes to.

Replicas are played by a handle that answers as Ray's does, in the order of a script. Importing Ray takes seconds: late.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import warnings
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from support import require_service

from nanogpt.deploy.exchange import Head, Request
from nanogpt.errors import SettingsError
from nanogpt.settings import Settings

pytestmark = pytest.mark.services

STREAM = Head(200, (("Content-Type", "text/event-stream; charset=utf-8"), ("X-Request-Id", "r1")))
WHOLE = Head(200, (("Content-Type", "application/json"),))
REFUSED = Head(503, (("Content-Type", "application/json"),))


@pytest.fixture(scope="module")
def ray() -> Any:
    require_service("ray", importlib.util.find_spec("ray") is not None, "pip install 'nano-gpt-api[ray]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        from nanogpt.deploy import front, prefix_router
        from nanogpt.deploy import ray as deploy

    return SimpleNamespace(front=front, router=prefix_router, deploy=deploy)


class Handle:
    """Ray's handle of replicas: each request gets the next line of the script; an exception is raised where it is."""

    def __init__(self, *script: list[Any]) -> None:
        self.script = list(script)
        self.keys: list[str] = []
        self.num_cancelled = 0
        self.answer = self

    def options(self, *, stream: bool, session_id: str) -> Handle:
        assert stream
        self.keys.append(session_id)
        return self

    def remote(self, request: Request) -> Any:
        handle, line = self, self.script.pop(0)

        async def parts() -> AsyncGenerator[Any, None]:
            for part in line:
                if isinstance(part, BaseException):
                    raise part
                yield part

        class Stream:
            def __init__(self) -> None:
                self.parts = parts()

            def __aiter__(self) -> Any:
                return self

            async def __anext__(self) -> Any:
                return await anext(self.parts)

            def cancel(self) -> None:
                handle.num_cancelled += 1

        return Stream()


def ask(ray: Any, handle: Handle, path: str = "/generate", method: str = "POST") -> list[Any]:
    request = Request(method, path, "", (), b'{"prompt": "To be"}')
    front = ray.front.Front(handle, Settings())

    async def run() -> list[Any]:
        return [part async for part in front.answer(request)]

    return asyncio.run(run())


def lost() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def test_what_had_not_begun_is_sent_again(ray: Any) -> None:
    """Not even to the client is a head shown before the first piece of the body is there."""
    handle = Handle([lost()], [WHOLE, lost()], [WHOLE, b"{}"])
    assert ask(ray, handle) == [WHOLE, b"{}"]
    assert handle.keys[0], "first by its prompt's beginning"
    assert handle.keys[1:] == ["", ""], "then to any other"


def test_a_request_that_brings_replicas_down_is_given_up(ray: Any) -> None:
    head, body = ask(ray, Handle(*[[lost()]] * ray.front.MAX_TRIES))
    assert (head.status, head.header("retry-after")) == (503, "5")
    assert json.loads(body)["code"] == "engine_died"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_what_had_begun_ends_with_an_error_event(ray: Any, path: str) -> None:
    head, first, last = ask(ray, Handle([STREAM, b"data: a\n\n", lost()]), path)
    assert (head, first) == (STREAM, b"data: a\n\n")
    if path == "/generate":
        assert last.startswith(b"event: error\ndata: ")
        assert json.loads(last.partition(b"data: ")[2])["request_id"] == "r1"
    else:
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_died"


def test_a_refusal_that_another_replica_need_not_make_is_asked_again(ray: Any) -> None:
    here, loading, full = WHOLE, b'{"code": "loading"}', b'{"code": "queue_full"}'
    assert ask(ray, Handle([REFUSED, loading], [here, b"{}"])) == [here, b"{}"]
    assert ask(ray, Handle([REFUSED, full])) == [REFUSED, full]
    assert ask(ray, Handle([REFUSED, loading]), "/ready", "GET") == [REFUSED, loading]
    assert ask(ray, Handle(*[[REFUSED, loading]] * 3)) == [REFUSED, loading], "the last one's word is what is told"


def test_a_client_that_leaves_cancels_the_replicas_work(ray: Any) -> None:
    handle = Handle([STREAM, b"a", b"b"])

    async def leave() -> None:
        parts = ray.front.Front(handle, Settings()).answer(Request("POST", "/generate", "", ()))
        await anext(parts)
        await anext(parts)
        await parts.aclose()

    asyncio.run(leave())
    assert handle.num_cancelled == 1


def test_a_full_queue_and_a_failed_deployment_are_refusals_in_our_form(ray: Any) -> None:
    from ray.serve.exceptions import BackPressureError

    head, body = ask(ray, Handle([BackPressureError(num_queued_requests=9, max_queued_requests=8)]))
    assert (head.status, json.loads(body)["code"]) == (503, "queue_full")


def test_a_replica_that_is_far_ahead_gives_its_prompts_to_the_next(ray: Any) -> None:
    names = [f"replica {i}" for i in range(5)]
    keys = [f"key {i}" for i in range(500)]

    def first(key: str, queued: list[int], names: list[str] = names) -> str:
        return names[ray.router.rank(key, names, queued, 8)[0]]

    idle = {key: first(key, [0] * 5) for key in keys}
    assert set(idle.values()) == set(names), "keys are spread"
    assert all(first(key, [8, 3, 0, 7, 5]) == idle[key] for key in keys), "within the bound every key stays"
    assert all(first(key, [9, 0, 0, 0, 0]) != names[0] for key in keys)
    gone = names[:4]
    assert all(first(key, [0] * 4, gone) == idle[key] for key in keys if idle[key] in gone), "only the lost ones move"


def test_arguments_are_settings_or_the_scale(ray: Any) -> None:
    app = ray.deploy.app({"min_replicas": "2", "max_replicas": "3", "cpus": "2", "max_batch_size": "16"})
    assert app is not None
    for args, words in (
        ({"max_batchsize": "16"}, "Did you mean max_batch_size"),
        ({"min_replicas": "3"}, "max_replicas"),
        ({"cpus": "many"}, "cpus"),
    ):
        with pytest.raises(SettingsError, match=words):
            ray.deploy.app(args)
