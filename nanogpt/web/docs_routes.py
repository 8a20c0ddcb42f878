"""The routes that describe the API: ``GET /`` (to a browser: the playground), ``/openapi.json`` and ``/docs``.

Made when they are first asked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from flask import Blueprint, Flask, Response, current_app, request

from nanogpt._version import __version__
from nanogpt.settings import Settings
from nanogpt.web.answers import json_response
from nanogpt.web.docs_page import POLICY, docs_page
from nanogpt.web.openapi import describe, offered
from nanogpt.web.playground_routes import page as playground_page
from nanogpt.web.playground_routes import wants_page


def make_docs_routes(settings: Settings) -> Blueprint:
    routes = Blueprint("docs", __name__)

    @routes.get("/")
    def index() -> Response:
        if wants_page(request):
            return playground_page()
        told = {f"{operation.method} {operation.path}": operation.summary for operation in offered(current_app)}
        del told["GET /"]
        response = json_response({"name": "nano-gpt-api", "version": __version__, "routes": told})
        response.headers["Vary"] = "Accept"
        return response

    @routes.get("/openapi.json")
    def openapi() -> Response:
        return json_response(document(unwrapped()))

    @routes.get("/docs")
    def docs() -> Response:
        response = Response(page(unwrapped()), mimetype="text/html")
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @cache
    def document(app: Flask) -> dict[str, Any]:
        return describe(offered(app), settings)

    @cache
    def page(app: Flask) -> str:
        return docs_page(document(app))

    def unwrapped() -> Flask:
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        return app

    return routes
