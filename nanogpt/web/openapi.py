"""The API's description: OpenAPI 3.1, made from the models that validate. Made once, from the routes that there are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from flask import Flask
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nanogpt._version import __version__
from nanogpt.settings import Settings
from nanogpt.web.guide_answers import Refusal
from nanogpt.web.openai.answers import OpenAIRefusal
from nanogpt.web.operations import OPERATIONS, REFUSALS, Operation

_REF = "#/components/schemas/{model}"
_STREAM = {
    "/generate": 'With stream: `data: {"text": …}` for each piece, then all fields of the answer, or `event: error`.',
}
_OPENAI_STREAM = "With stream: chunks for each choice, the usage where it was asked for, and `data: [DONE]`."


def offered(app: Flask) -> list[Operation]:
    """The operations that this app has routes for, in the order in which they are told."""
    paths = {openapi_path(rule.rule) for rule in app.url_map.iter_rules()}
    return [operation for operation in OPERATIONS if operation.path in paths]


def openapi_path(rule: str) -> str:
    """``/v1/models/<path:name>`` → ``/v1/models/{name}``."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def describe(operations: Collection[Operation], settings: Settings) -> dict[str, Any]:
    """The whole document."""
    schemas = _schemas(operations)
    generate = schemas.get("GenerateBody")
    if generate is not None:  # the limits of this server
        generate["properties"]["prompt"] |= {"minLength": 1, "maxLength": settings.max_prompt_chars}
        generate["properties"]["max_length"]["maximum"] = settings.max_new_tokens
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nano-gpt-api",
            "version": __version__,
            "description": "A GPT over HTTP. Where the server has a key, each request carries it.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "Bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _schemas(operations: Iterable[Operation]) -> dict[str, Any]:
    bodies = {operation.body for operation in operations if operation.body is not None}
    answers: set[type[BaseModel]] = {operation.answer for operation in operations if operation.answer is not None}
    models: list[tuple[type[BaseModel], Any]] = [(model, "validation") for model in bodies | answers]
    models += [(Refusal, "validation"), (OpenAIRefusal, "validation")]
    _, document = models_json_schema(sorted(models, key=lambda pair: pair[0].__name__), ref_template=_REF)
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def _operation(operation: Operation) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{operation.method.lower()}{operation.path}").strip("_")
    described: dict[str, Any] = {"operationId": name, "summary": operation.summary}
    parameters = [("path", True, *each) for each in operation.parameters]
    parameters += [("query", False, *each) for each in operation.query]
    if parameters:
        described["parameters"] = [
            {"name": name, "in": where, "required": required, "description": text, "schema": {"type": "string"}}
            for where, required, name, text in parameters
        ]
    if operation.body is not None:
        content: dict[str, Any] = {"schema": _ref(operation.body)}
        if operation.example is not None:
            content["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    responses = {"200": _answer(operation)}
    for status in operation.also:
        responses[str(status)] = {**_answer(operation), "description": "The same fields; not now."}
    for status in sorted(operation.refusals):
        responses[str(status)] = _refusal(operation, status)
    described["responses"] = responses
    if 401 in operation.refusals:
        described["security"] = [{}, {"ApiKey": []}, {"Bearer": []}]
    return described


def _answer(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {operation.media: {}}
    if operation.answer is not None:
        content = {operation.media: {"schema": _ref(operation.answer)}}
    if operation.page:
        content["text/html"] = {}
    if operation.streams:
        text = _STREAM.get(operation.path, _OPENAI_STREAM)
        content["text/event-stream"] = {"schema": {"type": "string", "description": text}}
    return {"description": "The answer.", "content": content}


def _refusal(operation: Operation, status: int) -> dict[str, Any]:
    form = OpenAIRefusal if operation.is_openai else Refusal
    answer: dict[str, Any] = {
        "description": REFUSALS[status],
        "content": {"application/json": {"schema": _ref(form)}},
    }
    if status in (429, 503):
        answer["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
    return answer


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
