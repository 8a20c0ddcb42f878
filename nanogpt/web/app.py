"""The Flask app: what surrounds every route, in the order in which a request meets it.

route → request id → auth → (here a request is counted against its limit, once there are limits) → the route's own
line in ``routes``. Making the app starts nothing: the engine is asked for when the first request needs it.
"""

from __future__ import annotations

import logging

from flask import Flask, Response, g, request

from nanogpt import logs
from nanogpt.engine.client import EngineClient
from nanogpt.errors import SettingsError
from nanogpt.settings import Settings
from nanogpt.web import process
from nanogpt.web.auth import make_check
from nanogpt.web.caller import Caller
from nanogpt.web.engine import EngineHandle
from nanogpt.web.errors import register_error_handlers
from nanogpt.web.redis_link import check_redis_url
from nanogpt.web.request_log import RequestLog, request_id
from nanogpt.web.routes import make_routes
from nanogpt.web.service import GenerationService


def create_app(settings: Settings | None = None, *, client: EngineClient | None = None) -> Flask:
    """The WSGI app. Without settings: those that gunicorn's arbiter checked, else this process's own.

    Raises: SettingsError.
    """
    settings = settings or process.settings or Settings.load()
    check_settings(settings)
    if not logging.getLogger().handlers:  # neither gunicorn's hooks nor whoever embeds the app has set up a log
        logs.configure(settings.log_format, settings.log_level)
    app = Flask("nanogpt.web", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False
    check_key = make_check(settings.api_key)

    @app.before_request
    def enter() -> None:
        g.request_id = request_id(request)
        g.record = RequestLog.start(request, g.request_id)
        g.caller = Caller(f"address:{request.remote_addr}")
        check_key(request)

    @app.after_request
    def leave(response: Response) -> Response:
        record: RequestLog | None = g.get("record")
        if record is not None:
            response.headers["X-Request-Id"] = record.request_id
            if record.cache is not None:
                response.headers["X-Cache"] = record.cache
            response.call_on_close(lambda: record.finish(response.status_code))
        return response

    register_error_handlers(app)
    app.extensions["nanogpt"] = engine = EngineHandle(settings, client)
    service = GenerationService(settings, engine)
    app.extensions["nanogpt.cache"] = service.cache.stats
    app.register_blueprint(make_routes(settings, engine, service))
    return app


def check_settings(settings: Settings) -> None:
    """What the web part cannot do as asked. Raises: SettingsError, MissingDependency."""
    check_redis_url(settings.redis_url)
    if settings.rate_limit != "off":
        raise SettingsError(
            f"RATE_LIMIT is {settings.rate_limit!r}; this version cannot limit requests and admits only off.",
            field="rate_limit",
            remedy="Set RATE_LIMIT=off and limit in the proxy.",
        )
