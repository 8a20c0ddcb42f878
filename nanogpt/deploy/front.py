"""The front: takes HTTP requests from Ray's proxies, hands each to a replica, and passes the answer on as it comes.

It is light (no model, no app) and decides nothing about requests. It is there for what a proxy cannot do: send a
request again when its replica dies before the answer has begun, say in a stream that its replica died, and choose the
replica by what a prompt begins with.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanogpt.deploy import metrics_page
from nanogpt.deploy.affinity import affinity_key
from nanogpt.deploy.exchange import Head, Request
from nanogpt.errors import EngineDied, EngineUnhealthy, NanoGPTError, QueueFull, RequestTimeout
from nanogpt.settings import Settings
from nanogpt.web.answers import event, to_json
from nanogpt.web.errors import error_body
from nanogpt.web.openai.errors import is_openai, openai_error

log = logging.getLogger(__name__)

# Replicas that one request may be sent to: one that brings its replica down must not bring all of them down.
MAX_TRIES = 3
_PAUSE_S = 0.2
_LOST = (RayActorError, ReplicaUnavailableError)
# Refusals (503) of a replica that cannot take a request which another can, or itself in a moment.
_NOT_HERE = frozenset({"engine_died", "loading", "unhealthy", "draining"})
_METRICS_S = 10.0


class Front:
    """Ray calls it once a request. It keeps nothing: any number of them may stand beside each other."""

    def __init__(self, replicas: Any, settings: Settings) -> None:
        self._replicas = replicas
        self._max_body_bytes = settings.max_body_bytes
        # A replica ends what takes too long by itself; this is for requests that no replica takes.
        self._patience_s = settings.request_timeout_s + settings.engine_wait_s

    async def __call__(self, http: HttpRequest) -> Response:
        request = await _read(http, self._max_body_bytes)
        return _Relay(self.answer(request), request.header("x-request-id"))

    async def answer(self, request: Request) -> AsyncGenerator[Head | bytes, None]:
        """A head, then the body as it comes."""
        refusal: NanoGPTError
        try:
            if request.method == "GET" and request.route == "/metrics":
                for part in await self._metrics(request):
                    yield part
                return
            async with aclosing(self._with_tries(request)) as parts:
                async for part in parts:
                    yield part
            return
        except BackPressureError:
            refusal = QueueFull("All replicas are busy, and the queue before them is full.")
        except DeploymentUnavailableError:
            refusal = EngineUnhealthy("No replica can be started: serve status says why.", retry_after_s=5.0)
        except NanoGPTError as error:
            refusal = error
        request_id = request.header("x-request-id") or uuid.uuid4().hex
        headers = [("Content-Type", "application/json"), ("X-Request-Id", request_id)]
        if refusal.retry_after_s is not None:
            headers.append(("Retry-After", str(math.ceil(refusal.retry_after_s))))
        yield Head(refusal.status, tuple(headers))
        yield to_json(_body(refusal, request, request_id)) + b"\n"

    async def _with_tries(self, request: Request) -> AsyncGenerator[Head | bytes, None]:
        """Raises: RequestTimeout, EngineDied; before anything was yielded."""
        key = affinity_key(request)
        for tries_left in reversed(range(MAX_TRIES)):
            stream = self._replicas.options(stream=True, session_id=key).answer.remote(request)
            begun: Head | None = None
            ended = False
            try:
                head, piece = await asyncio.wait_for(_beginning(stream), self._patience_s)
                if not tries_left or not _is_not_here(request, head, piece):
                    begun = head
                    yield head
                    yield piece
                    async for piece in stream:
                        yield piece
                    ended = True
                    return
            except _LOST as error:
                ended = True
                log.warning("A request has lost its replica: %s.", type(error).__name__)
                if begun is not None:
                    if not begun.is_stream:
                        raise  # the connection is cut, and its client sees less than was announced
                    yield _last_words(request, begun)
                    return
            except asyncio.TimeoutError:
                raise RequestTimeout("No replica took the request before its deadline.") from None
            finally:
                if not ended:
                    stream.cancel()
            key = ""  # any other
            await asyncio.sleep(_PAUSE_S)
        raise EngineDied(f"{MAX_TRIES} replicas have ended while they had this request.", retry_after_s=5.0)

    async def _metrics(self, request: Request) -> tuple[Head, bytes]:
        """The pages of all replicas as one: a scrape through a proxy would otherwise find another one each time."""
        plain = request.without_header("accept")
        calls = self._replicas.broadcast("answer_whole", plain)
        answers = await calls.results_async(timeout_s=_METRICS_S, return_exceptions=True)
        answers = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not answers:
            raise EngineUnhealthy("No replica answers: serve status says why.", retry_after_s=5.0)
        for head, body in answers:
            if head.status != 200:  # all refuse alike: the key is missing
                return head, body
        pages = [(head.header("x-replica"), body.decode()) for head, body in answers]
        return Head(200, (("Content-Type", metrics_page.CONTENT_TYPE),)), metrics_page.merge(pages).encode()


class _Relay(Response):
    """An answer as it is passed on to the proxy. When the client leaves, Ray cancels this, and the replica is told."""

    def __init__(self, parts: AsyncGenerator[Head | bytes, None], request_id: str) -> None:
        super().__init__()
        self._parts = parts
        # The proxy gives each request an id, and says it in the answer: ours is the same, and would be its second.
        self._told = ("X-Request-Id", request_id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            async for part in parts:
                if isinstance(part, Head):
                    told = [(name, value) for name, value in part.headers if (name, value) != self._told]
                    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in told]
                    await send({"type": "http.response.start", "status": part.status, "headers": headers})
                elif part:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read(http: HttpRequest, max_body_bytes: int) -> Request:
    """The request with its body, of which no more is kept than shows that it is too large."""
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > max_body_bytes:
            del body[max_body_bytes + 1 :]
            break
    scope = http.scope
    return Request(
        method=scope["method"],
        path=scope["path"],
        query=scope["query_string"].decode("latin-1"),
        headers=tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]),
        body=bytes(body),
        client=scope["client"][0] if scope.get("client") else "",
        scheme=scope.get("scheme", "http"),
        host=tuple(scope["server"]) if scope.get("server") else ("localhost", 80),
        prefix=scope.get("root_path", ""),
    )


async def _beginning(stream: Any) -> tuple[Head, bytes]:
    head = await anext(stream)
    return head, await anext(stream, b"")


def _is_not_here(request: Request, head: Head, piece: bytes) -> bool:
    """Whether this replica refuses what another may take."""
    if head.status != 503 or request.method != "POST":
        return False
    try:
        body = json.loads(piece)
        code = body["error"]["code"] if is_openai(request.route) else body["code"]
    except (ValueError, KeyError, TypeError):
        return False
    return code in _NOT_HERE


def _last_words(request: Request, begun: Head) -> bytes:
    """The error event of a stream whose replica is gone."""
    error = EngineDied("The replica that wrote this text has ended.", remedy="Send the request again.")
    body = _body(error, request, begun.header("x-request-id"))
    return event(body) if is_openai(request.route) else event(body, "error")


def _body(error: NanoGPTError, request: Request, request_id: str) -> dict[str, Any]:
    return openai_error(error) if is_openai(request.route) else error_body(error, request_id)
