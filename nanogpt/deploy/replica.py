"""A replica: one engine (with its supervisor, as under gunicorn) and the web app in front of it, in one Ray actor.

It has no API of its own: HTTP requests come in as data and go through the same Flask app as behind gunicorn, each in a
thread. Knows nothing of Ray, but for the methods that Ray Serve calls: ``reconfigure``, ``check_health``, ``__del__``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from nanogpt.deploy.exchange import Head, Request
from nanogpt.deploy.wsgi_call import call
from nanogpt.engine.client import refusal
from nanogpt.engine.launch import start_supervisor
from nanogpt.errors import EngineLoading, NanoGPTError, SettingsError
from nanogpt.settings import Settings
from nanogpt.web.app import check_settings, create_app
from nanogpt.web.metrics import metrics
from nanogpt.web.models import Models

log = logging.getLogger(__name__)

# Threads beside those that hold generations: for /health, for refusals.
SPARE_THREADS = 16
# The supervisor keeps a reload's deadline itself; past this much more it is stuck.
_GRACE_S = 30.0


def replica_settings(given: Mapping[str, Any], num_cpus: int) -> Settings:
    """The settings of one replica: those of ``given`` above those of its own environment.

    Raises: SettingsError.
    """
    settings = Settings.load(dict(given))
    if settings.admin_key:
        log.warning("ADMIN_KEY is set, but there is no /admin here: it would change the model of one replica alone.")
    settings = dataclasses.replace(
        settings,
        # Each replica has its own, also on the same machine.
        run_dir="",
        admin_key="",
        threads=settings.threads or num_cpus,
    )
    check_settings(settings)
    return settings


class Replica:
    """Made once the model is served. ``name`` is what ``X-Replica`` says in its answers.

    Raises (from the constructor): NanoGPTError, saying why the model cannot be served.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._supervisor = start_supervisor(settings, os.getpid())
        try:
            self._app = create_app(settings)
            models: Models = self._app.extensions["nanogpt"]
            self._engine = models.main
            metrics.start()
            status = self._engine.client.wait_ready(settings.reload_timeout_s)
            if status.state != "ready":
                raise refusal(status)
        except BaseException:
            self._supervisor.stop(timeout_s=5.0)
            raise
        self._threads = ThreadPoolExecutor(settings.http_threads + SPARE_THREADS, "request")
        log.info("Serving %s on %s, %s threads.", status.model, status.device, settings.threads or "all")

    async def answer(self, request: Request) -> AsyncGenerator[Head | bytes, None]:
        """The head of the answer, then its body as it comes. Whoever stops reading is a client that has left."""
        async with aclosing(call(self._app, request, self._threads)) as parts:
            async for part in parts:
                yield part if isinstance(part, bytes) else Head(part.status, (*part.headers, ("X-Replica", self._name)))

    async def answer_whole(self, request: Request) -> tuple[Head, bytes]:
        """For answers that are no streams."""
        head, body = Head(500, ()), b""
        async for part in self.answer(request):
            if isinstance(part, Head):
                head = part
            else:
                body += part
        return head, body

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Ray's ``user_config``: serve another checkpoint, through the same gates as ``nanogpt reload``.

        A model that is refused is logged, and the one before serves on. A config that cannot be meant is an error.

        Raises: SettingsError.
        """
        unknown = sorted(set(config) - {"checkpoint", "loss_gate"})
        if unknown:
            raise SettingsError(
                f"Unknown key {unknown[0]!r} in user_config.", remedy="It may hold checkpoint and loss_gate."
            )
        gate = config.get("loss_gate")
        if gate is not None and set(gate) != {"text", "max_loss"}:
            raise SettingsError("loss_gate in user_config needs text and max_loss, and nothing else.")
        checkpoint = config.get("checkpoint")
        if checkpoint and checkpoint != self._settings.model_checkpoint:
            await asyncio.get_running_loop().run_in_executor(None, self._reload, str(checkpoint), gate)

    def _reload(self, checkpoint: str, gate: Mapping[str, Any] | None) -> None:
        gate = {"text": str(gate["text"]), "max_loss": float(gate["max_loss"])} if gate else None
        try:
            reply = self._engine.client.command("reload", checkpoint=checkpoint, loss_gate=gate, who="user_config")
            answer = reply.get(self._settings.reload_timeout_s + _GRACE_S)
            if answer is None:
                raise EngineLoading("The engine's supervisor does not answer.")
        except NanoGPTError as error:
            log.error("%s is not served, and the model before serves on: %s", checkpoint, error)
            return
        self._settings = dataclasses.replace(self._settings, model_checkpoint=checkpoint)
        log.info("Serving %s (digest %s).", answer["model"]["name"], answer["model"]["digest"])

    def check_health(self) -> None:
        """Raises: ServiceUnavailable unless a request would be answered now."""
        status = self._engine.state()
        if status.state != "ready":
            raise refusal(status)

    def __del__(self) -> None:
        """Ray calls it when requests have ended, or their time has. The engine would also notice this process's end."""
        if supervisor := getattr(self, "_supervisor", None):
            supervisor.stop(timeout_s=5.0)
