"""Every operation of the API in one list: what it takes, what it answers with, and how it may refuse.

The single source of ``GET /``, of ``/openapi.json`` and of ``/docs``. A test holds it to the routes that there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from nanogpt.web.fields import Fields
from nanogpt.web.guide_answers import GenerateAnswer, Health, Index, ModelInfo, Ready
from nanogpt.web.openai.answers import (
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    ModelList,
    ModelObject,
    TokenizeAnswer,
    TokenizerInfo,
)
from nanogpt.web.openai.schemas import ChatBody, CompletionBody
from nanogpt.web.openai.tokens import DetokenizeBody, TokenizeBody
from nanogpt.web.schemas import GenerateBody

REFUSALS = {
    400: "The request can never succeed as it was sent: a field is missing, unknown, of a wrong type or out of limits.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is not JSON, or in an unknown charset.",
    429: "This client is over its own limit; Retry-After says when to try again.",
    500: "A defect; the log has the details under the request id.",
    503: "Not now: loading, draining, full, or the engine is down. Retry-After says when to try again.",
    504: "The request had no turn before its deadline.",
}
_CLOSED = (401, 429, 500)
_TOKENIZER = (400, 401, 404, 413, 415, 429, 500, 503)
_GENERATES = (400, 401, 404, 413, 415, 429, 500, 503, 504)


@dataclass(frozen=True)
class Operation:
    """``path`` as OpenAPI writes it. ``refusals`` are keys of REFUSALS; ``answers`` maps other statuses, as 503 of
    /health, to the same form as 200. ``answer`` None: not JSON, but ``media``. ``page``: who
    accepts HTML gets that instead. ``parameters`` are parts of the path, those of ``query`` may be left out."""

    method: str
    path: str
    summary: str
    answer: type[BaseModel] | None
    refusals: tuple[int, ...] = ()
    body: type[Fields] | None = None
    example: dict[str, Any] | None = None
    streams: bool = False
    also: tuple[int, ...] = ()
    media: str = "application/json"
    parameters: tuple[tuple[str, str], ...] = ()
    query: tuple[tuple[str, str], ...] = ()
    page: bool = False

    @property
    def is_openai(self) -> bool:
        return self.path.startswith("/v1/")


_WHICH = (("model", "The name of a served model, or default."),)
_SAY = "Once upon a time"
OPERATIONS = (
    Operation(
        "POST",
        "/generate",
        "Continue a text.",
        GenerateAnswer,
        _GENERATES,
        GenerateBody,
        {"prompt": _SAY, "max_length": 100},
        streams=True,
    ),
    Operation("GET", "/health", "Whether the model is loaded, and on which device.", Health, also=(503,)),
    Operation("GET", "/ready", "Whether a request would be answered now.", Ready, also=(503,)),
    Operation(
        "POST",
        "/v1/completions",
        "Continue texts, as OpenAI's API does.",
        CompletionAnswer,
        _GENERATES,
        CompletionBody,
        {"prompt": _SAY, "max_tokens": 30, "logprobs": 2},
        streams=True,
    ),
    Operation(
        "POST",
        "/v1/chat/completions",
        "Answer in a conversation, as OpenAI's API does.",
        ChatAnswer,
        _GENERATES,
        ChatBody,
        {"messages": [{"role": "user", "content": "Who are you?"}], "max_completion_tokens": 30},
        streams=True,
    ),
    Operation("GET", "/v1/models", "The models that are served, the default first.", ModelList, (*_CLOSED, 503)),
    Operation(
        "GET",
        "/v1/models/{name}",
        "A served model, by its name.",
        ModelObject,
        (*_CLOSED, 404, 503),
        parameters=(("name", "The model's name, or default."),),
    ),
    Operation("POST", "/tokenize", "A text as tokens.", TokenizeAnswer, _TOKENIZER, TokenizeBody, {"prompt": _SAY}),
    Operation(
        "POST", "/detokenize", "Tokens as a text.", DetokenizeAnswer, _TOKENIZER, DetokenizeBody, {"tokens": [1, 2, 3]}
    ),
    Operation(
        "GET", "/tokenizer_info", "What tokenizer the model has.", TokenizerInfo, (*_CLOSED, 404, 503), query=_WHICH
    ),
    Operation(
        "GET",
        "/model_info",
        "What the served model is, and how it runs.",
        ModelInfo,
        (*_CLOSED, 404, 503),
        query=_WHICH,
    ),
    Operation("GET", "/metrics", "The server's numbers, for Prometheus.", None, (401, 500), media="text/plain"),
    Operation("GET", "/openapi.json", "The API's description, as OpenAPI 3.1.", None),
    Operation("GET", "/docs", "The API's description, as a page to read.", None, media="text/html"),
    Operation("GET", "/", "The routes, and the version; to a browser the playground.", Index, page=True),
)
