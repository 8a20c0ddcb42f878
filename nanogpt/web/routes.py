"""The routes, each one straight line from request to answer. What surrounds every route is in ``app``."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from flask import Blueprint, Response, g, request

from nanogpt.engine.client import EngineStatus
from nanogpt.web import process
from nanogpt.web.answers import json_response
from nanogpt.web.body import read_json_object
from nanogpt.web.engine import ServedModel
from nanogpt.web.generation import Outcome, TextGeneration
from nanogpt.web.schemas import GenerateBody
from nanogpt.web.service import GenerationService
from nanogpt.web.streaming import EventStream, GuideForm
from nanogpt.web.token_logprobs import plain_logprobs


def make_routes(service: GenerationService) -> Blueprint:
    """The guide's API on this engine."""
    routes = Blueprint("guide", __name__)
    settings, models = service.settings, service.models

    @routes.post("/generate")
    def generate() -> Response:
        body = GenerateBody.parse(read_json_object(request, settings.max_body_bytes), settings)
        with ExitStack() as held:
            held.enter_context(service.place())
            model = service.model(body.model)
            text = service.start(model, model.tokenizer.encode(body.prompt), body.sampling_params(), cache=body.cache)
            held.enter_context(closing(text))
            if body.stream:
                form = GuideForm(text, partial(generate_answer, body, text, model))
                return EventStream(text, g.record, form, held.pop_all()).response()
            try:
                return json_response(generate_answer(body, text, model, text.run()))
            finally:
                g.record.describe(text)

    @routes.get("/health")
    def health() -> Response:
        status, device, reason = engine_status()
        body: dict[str, Any] = {"status": status, "model_loaded": status == "healthy", "device": device}
        if reason:
            body["reason"] = reason
        if models.compare is not None:  # of interest, but not what this server is there for: the status is the first's
            body["compare"] = _word(models.compare.state())
        return json_response(body, 200 if status == "healthy" else 503)

    @routes.get("/ready")
    def ready() -> Response:
        status, _, reason = engine_status()
        body: dict[str, Any] = {"ready": status == "healthy"}
        if status != "healthy":
            body["reason"] = reason or status
        return json_response(body, 200 if status == "healthy" else 503)

    def engine_status() -> tuple[str, str | None, str | None]:
        """The guide's word for the state, the device, and the reason where it is not healthy."""
        now = models.main.state()
        status = _word(now)
        if process.is_draining():
            status = "draining"
        return status, now.device or None, now.reason or None if status != "healthy" else None

    return routes


def _word(status: EngineStatus) -> str:
    """The guide's word for the state."""
    return "healthy" if status.state == "ready" else status.state


def generate_answer(body: GenerateBody, text: TextGeneration, model: ServedModel, outcome: Outcome) -> dict[str, Any]:
    """The guide's three fields first, then ours."""
    answer = {
        "prompt": body.prompt,
        "generated_text": body.prompt + outcome.text,
        "tokens_generated": outcome.num_output_tokens,
        "finish_reason": outcome.finish_reason,
        "model": model.name,
        "usage": {
            "prompt_tokens": outcome.num_prompt_tokens,
            "completion_tokens": outcome.num_output_tokens,
            "total_tokens": outcome.num_prompt_tokens + outcome.num_output_tokens,
            "cached_tokens": outcome.num_cached_tokens,
        },
        "timings": {
            "queue_s": round(outcome.queue_s, 6),
            "ttft_s": round(outcome.ttft_s, 6),
            "total_s": round(outcome.total_s, 6),
            "tokens_per_second": round(outcome.tokens_per_second, 2),
        },
    }
    if body.logprobs is not None:
        answer["logprobs"] = plain_logprobs(text)
    return answer
