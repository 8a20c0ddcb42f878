"""Generations as server-sent events: pieces of text, pings in silence, and an end. Owned by the request's thread.

What an event looks like is its route's business (a ``Form``): for /generate ``data: {"text": …}`` for each piece; at
the end ``data:`` with all the fields of the answer that is not streamed, or ``event: error`` with those of a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any, Protocol

from flask import Response, request

from nanogpt.errors import NanoGPTError
from nanogpt.web.answers import PING, event
from nanogpt.web.connection import stream_socket
from nanogpt.web.direct import DirectWriter
from nanogpt.web.errors import error_body, unexpected
from nanogpt.web.generation import ClientGone, Outcome, TextGeneration
from nanogpt.web.group import TextGroup
from nanogpt.web.request_log import RequestLog
from nanogpt.web.token_logprobs import plain_logprobs


class Form(Protocol):
    """How what iteration gives is written: as bytes, empty where nothing is to be said yet."""

    def piece(self, piece: Any) -> bytes: ...

    def end(self) -> bytes: ...

    def error(self, error: NanoGPTError, request_id: str) -> bytes: ...


class GuideForm:
    """The form of /generate."""

    def __init__(self, text: TextGeneration, final: Callable[[Outcome], dict[str, Any]]) -> None:
        self._text = text
        self._final = final
        self._num_told = 0

    def piece(self, piece: str) -> bytes:
        fields: dict[str, Any] = {"text": piece}
        if self._text.logprobs:
            fields["logprobs"] = plain_logprobs(self._text, self._num_told)
            self._num_told = self._text.num_tokens
        return event(fields)

    def end(self) -> bytes:
        assert self._text.outcome is not None
        return event(self._final(self._text.outcome))

    def error(self, error: NanoGPTError, request_id: str) -> bytes:
        return event(error_body(error, request_id), "error")


class EventStream:
    """The body of a streamed answer. Its ``close`` runs however the answer ends, also before the first byte.

    ``held`` is what the request holds (its place, its text), and is closed with it.
    """

    def __init__(self, text: TextGeneration | TextGroup, record: RequestLog, form: Form, held: ExitStack) -> None:
        self._text = text
        self._record = record
        self._form = form
        self._held = held
        self._events: Iterator[bytes] = iter(())
        self._direct = self._make_direct()

    def response(self) -> Response:
        """The answer, once its first piece is there: until then a failure is still a plain JSON refusal."""
        pieces: Iterator[Any] = iter(self._text)
        try:
            first = [next(pieces)]
        except StopIteration:
            first = []
        except BaseException:
            self.close()
            raise
        self._events = self._make_events(chain(first, pieces))
        response = Response(self, mimetype="text/event-stream")
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        return response

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._events)

    def close(self) -> None:
        if self._text.finish_reason is None and self._record.outcome is None:
            self._record.outcome = ClientGone.code  # gunicorn could not write, or never began to
        self._held.close()
        self._record.describe(self._text)

    def _make_direct(self) -> DirectWriter | None:
        sock = stream_socket(request.environ)
        if isinstance(self._text, TextGeneration):
            text, write = self._text, self._form.piece
        elif len(self._text.texts) == 1:
            text = self._text.texts[0]

            def write(piece: str) -> bytes:
                return self._form.piece((0, piece))
        else:
            return None
        generation = text.live
        return None if sock is None or generation is None else DirectWriter(sock, generation, text, write)

    def _make_events(self, pieces: Iterator[Any]) -> Iterator[bytes]:
        begun = False
        try:
            for piece in pieces:
                data = PING if piece is None else self._form.piece(piece)
                if data:
                    yield data
                    begun = True  # when this goes on, that is written, and before it the answer's head
                if begun and self._direct is not None:
                    self._direct.run()
            yield self._form.end()
        except ClientGone as gone:
            self._record.outcome = gone.code
        except Exception as error:
            request_id = self._record.request_id
            refusal = error if isinstance(error, NanoGPTError) else unexpected(error, request_id)
            self._record.outcome = refusal.code
            yield self._form.error(refusal, request_id)
