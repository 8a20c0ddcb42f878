"""The Flask app: what surrounds every route, in the order in which a request meets it.

route → request id → key → the client's limit → the route's own line in ``routes``. Making the app starts nothing: the
engine is asked for when the first request needs it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flask import Flask, Response, g, request

from nanogpt import logs
from nanogpt.engine.client import EngineClient
from nanogpt.engine.windows import Counters
from nanogpt.errors import SettingsError, TooManyRequests
from nanogpt.keys import KeyRing
from nanogpt.settings import Settings
from nanogpt.web import process
from nanogpt.web.admin import make_admin_routes
from nanogpt.web.auth import Doorkeeper
from nanogpt.web.caller import Caller
from nanogpt.web.client_address import client_address
from nanogpt.web.docs_routes import make_docs_routes
from nanogpt.web.engine import EngineHandle
from nanogpt.web.errors import register_error_handlers
from nanogpt.web.limits import GENERATING_ROUTES, Limiter
from nanogpt.web.metrics import metrics
from nanogpt.web.metrics_page import make_metrics_page
from nanogpt.web.models import Models
from nanogpt.web.openai.routes import make_openai_routes
from nanogpt.web.playground_routes import make_playground_routes
from nanogpt.web.rate_limit import parse_rate_limit
from nanogpt.web.redis_link import check_redis_url
from nanogpt.web.redis_windows import RedisWindows
from nanogpt.web.request_log import RequestLog, request_id
from nanogpt.web.routes import make_routes
from nanogpt.web.service import GenerationService
from nanogpt.web.shedding import LoadShedder


def create_app(
    settings: Settings | None = None,
    *,
    client: EngineClient | None = None,
    compare_client: EngineClient | None = None,
    counters: Counters | None = None,
) -> Flask:
    """The WSGI app. Without settings: those that gunicorn's arbiter checked, else this process's own.

    ``client``, ``compare_client`` and ``counters`` stand for the engines and for the host's ledger.

    Raises: SettingsError.
    """
    settings = settings or process.settings or Settings.load()
    check_settings(settings)
    if not logging.getLogger().handlers:  # neither gunicorn's hooks nor whoever embeds the app has set up a log
        logs.configure(settings.log_format, settings.log_level)
    app = Flask("nanogpt.web", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False
    engine = EngineHandle(settings, client)
    models = Models(engine, EngineHandle(settings, compare_client, "compare") if settings.compare_checkpoint else None)
    limiter = Limiter(settings, engine, counters)
    doorkeeper = Doorkeeper(settings.api_key, open_keys(settings), settings.admin_key)
    shedder = LoadShedder(settings, doorkeeper)

    @app.before_request
    def enter() -> None:
        g.request_id = request_id(request)
        g.record = RequestLog.start(request, g.request_id)
        g.caller = Caller(f"address:{client_address(request, settings.trusted_proxies)}")
        g.caller = doorkeeper.identify(request) or g.caller
        g.limit_headers = {}
        if request.url_rule is not None and request.url_rule.rule in GENERATING_ROUTES:
            shedder.check(g.caller)
            try:
                g.limit_headers = limiter.admit(g.caller)
            except TooManyRequests as error:
                shedder.note_limited(g.caller, error)
                raise

    @app.after_request
    def leave(response: Response) -> Response:
        record: RequestLog | None = g.get("record")
        if record is not None:
            response.headers["X-Request-Id"] = record.request_id
            if record.trace.traceparent is not None:
                response.headers["traceparent"] = record.trace.traceparent
            record.caller = g.caller.name
            response.headers.update(g.get("limit_headers", {}))
            if record.cache is not None:
                response.headers["X-Cache"] = record.cache
            response.call_on_close(lambda: record.finish(response.status_code))
        return response

    register_error_handlers(app)
    app.extensions["nanogpt"] = models
    app.extensions["nanogpt.doorkeeper"] = doorkeeper
    metrics.configure(settings)
    service = GenerationService(settings, models, limiter, shedder)
    app.extensions["nanogpt.cache"] = service.cache.stats
    app.register_blueprint(make_routes(service))
    app.register_blueprint(make_openai_routes(service))
    app.register_blueprint(make_docs_routes(settings))
    app.register_blueprint(make_playground_routes(service))
    app.register_blueprint(make_metrics_page(models.states))
    if settings.admin_key:
        app.register_blueprint(make_admin_routes(settings, models))
    shedder.learn_routes(app)
    app.extensions["nanogpt.shedder"] = shedder
    return app


def check_settings(settings: Settings) -> None:
    """What the web part cannot do as asked. Raises: SettingsError, MissingDependency."""
    parse_rate_limit(settings.rate_limit)
    check_redis_url(settings.redis_url)
    if settings.redis_url:
        RedisWindows(settings.redis_url)
    if settings.admin_key and settings.admin_key == settings.api_key:
        raise SettingsError(
            "ADMIN_KEY is the same as API_KEY: everybody who may generate could change the model.",
            field="admin_key",
            remedy="Choose another ADMIN_KEY.",
        )
    if bool(settings.follow_loss_text) != bool(settings.follow_max_loss):
        raise SettingsError(
            "follow_loss_text and follow_max_loss are one gate: one is set and the other is not.",
            field="follow_max_loss",
            remedy="Set both, or neither.",
        )
    if settings.follow and not os.path.isdir(settings.model_checkpoint):
        raise SettingsError(
            f"follow needs a folder to look at, and model_checkpoint is {settings.model_checkpoint!r}.",
            field="follow",
            remedy="Serve the folder that the training run writes to, such as log/.",
        )


def open_keys(settings: Settings) -> KeyRing | None:
    """The keys file, if there is one: that which the arbiter has read, or read now. Raises: SettingsError."""
    if not settings.keys_file:
        return None
    path = Path(settings.keys_file)
    if process.keys is not None and process.keys.path == path:
        process.keys.refresh(now=True)
        return process.keys
    return KeyRing(path)
