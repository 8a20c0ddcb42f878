"""Every refusal in one JSON shape: ``{"error", "code", "request_id"}``, and ``field`` and ``remedy`` where known; under
``/v1/`` in OpenAI's.

Also the last line of defence: an error nobody expected becomes a 500 in the same shape, and its place in the code (not
its message, which may quote a prompt) goes to the log.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WerkzeugMethodNotAllowed

from nanogpt.errors import MethodNotAllowed, NanoGPTError, NotFound, TooManyRequests, Unauthorized
from nanogpt.web.answers import json_response
from nanogpt.web.openai.errors import is_openai, openai_error

log = logging.getLogger(__name__)


def error_body(error: NanoGPTError, request_id: str) -> dict[str, Any]:
    body: dict[str, Any] = {"error": error.message, "code": error.code, "request_id": request_id}
    if error.field:
        body["field"] = error.field
    if error.remedy:
        body["remedy"] = error.remedy
    return body


def error_content(error: NanoGPTError, path: str, request_id: str) -> dict[str, Any]:
    """What is said of an error on this path."""
    return openai_error(error) if is_openai(path) else error_body(error, request_id)


def error_headers(error: NanoGPTError) -> dict[str, str]:
    """What the headers say of an error."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, TooManyRequests):
        headers.update(error.headers)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(error: NanoGPTError) -> Response:
    if (record := g.get("record")) is not None:
        record.outcome = error.code
    response = json_response(error_content(error, request.path, g.get("request_id", "")), error.status)
    response.headers.update(error_headers(error))
    return response


def unexpected(error: Exception, request_id: str) -> NanoGPTError:
    """The 500 for an error that nobody expected; where it came from goes to the log and not to the client."""
    silent = type(type(error).__name__, (Exception,), {"__module__": "builtins"})("(withheld: it may quote a request)")
    log.error("Request %s failed.", request_id, exc_info=(type(silent), silent, error.__traceback__))
    return NanoGPTError("Internal error", remedy="The server's log has the details under this request_id.")


def register_error_handlers(app: Flask) -> None:
    @app.errorhandler(NanoGPTError)
    def refused(error: NanoGPTError) -> Response:
        return error_response(error)

    @app.errorhandler(HTTPException)
    def from_werkzeug(error: HTTPException) -> Response:
        """Routing's own refusals, in our shape."""
        if isinstance(error, WerkzeugMethodNotAllowed):
            allowed = ", ".join(sorted(set(error.valid_methods or ()) - {"OPTIONS"}))
            response = error_response(MethodNotAllowed("Method not allowed", remedy=f"Use {allowed}."))
            response.headers["Allow"] = allowed
            return response
        if error.code == 404:
            return error_response(NotFound("Not found", remedy="GET / lists the routes."))
        refusal = NanoGPTError(error.name)
        refusal.status, refusal.code = error.code or 500, error.name.lower().replace(" ", "_")
        return error_response(refusal)

    @app.errorhandler(Exception)
    def crashed(error: Exception) -> Response:
        return error_response(unexpected(error, g.get("request_id", "")))
