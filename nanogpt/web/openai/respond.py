"""The end of a request's way that completions and chats share: its texts begin, and become an answer or a stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

from flask import Response, g

from nanogpt.errors import NanoGPTError
from nanogpt.web.answers import json_response
from nanogpt.web.group import TextGroup
from nanogpt.web.openai.job import Job
from nanogpt.web.openai.stream import OpenAIForm
from nanogpt.web.service import GenerationService
from nanogpt.web.streaming import EventStream


def respond(
    service: GenerationService,
    job: Job,
    held: ExitStack,
    *,
    cache: bool,
    form: Callable[[TextGroup], OpenAIForm] | None,
    answer: Callable[[TextGroup], dict[str, Any]],
) -> Response:
    """The response to a job, as a stream where there is a ``form`` for one. ``held`` is closed with its last byte."""
    try:
        group = service.start_many(job.model, job.texts(), cache=cache)
        held.enter_context(closing(group))
        if form is not None:
            return EventStream(group, g.record, form(group), held.pop_all()).response()
        try:
            group.run()
            return json_response(answer(group))
        finally:
            g.record.describe(group)
    except NanoGPTError as error:
        job.name_field(error)
        raise
