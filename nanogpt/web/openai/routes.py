"""The routes of OpenAI's API, and those of the tokenizer. What surrounds every route is in ``app``."""

from __future__ import annotations

import time
from typing import Any

from flask import Blueprint, Response, request

from nanogpt.web.answers import json_response
from nanogpt.web.body import read_json_object
from nanogpt.web.engine import ServedModel
from nanogpt.web.models import DEFAULT
from nanogpt.web.openai.chat import chat_completions
from nanogpt.web.openai.completions import completions
from nanogpt.web.openai.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize, tokenizer_info
from nanogpt.web.service import GenerationService


def make_openai_routes(service: GenerationService) -> Blueprint:
    routes = Blueprint("openai", __name__)
    max_bytes = service.settings.max_body_bytes
    started = int(time.time())

    @routes.post("/v1/completions")
    def post_completions() -> Response:
        return completions(service)

    @routes.post("/v1/chat/completions")
    def post_chat_completions() -> Response:
        return chat_completions(service)

    @routes.get("/v1/models")
    def list_models() -> Response:
        return json_response({"object": "list", "data": [model_object(model) for model in served()]})

    @routes.get("/v1/models/<path:name>")
    def get_model(name: str) -> Response:
        return json_response(model_object(served_model(name)))

    @routes.post("/tokenize")
    def post_tokenize() -> Response:
        body = TokenizeBody.parse(read_json_object(request, max_bytes))
        with service.place():
            return json_response(tokenize(body, service.model(body.model)))

    @routes.post("/detokenize")
    def post_detokenize() -> Response:
        body = DetokenizeBody.parse(read_json_object(request, max_bytes))
        with service.place():
            return json_response(detokenize(body, service.model(body.model)))

    @routes.get("/tokenizer_info")
    def get_tokenizer_info() -> Response:
        return json_response(tokenizer_info(served_model(request.args.get("model", DEFAULT))))

    def served_model(name: str) -> ServedModel:
        with service.place():  # a model that is loading is waited for
            return service.model(name)

    def served() -> list[ServedModel]:
        with service.place():
            return service.models.served()

    def model_object(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": started,
            "owned_by": "nano-gpt-api",
            "max_model_len": model.card.get("block_size"),
            "digest": model.digest or None,
        }

    return routes
