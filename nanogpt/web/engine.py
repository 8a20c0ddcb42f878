"""This worker process's way to the engine: one client, made by the first thread that needs it.

Made lazily and once a process: the app may be imported before gunicorn forks (``--preload``), and a client's thread
and socket do not outlive a fork. Where nobody has started the engine (gunicorn without our configuration,
``flask run``), making the client starts it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanogpt.errors import EngineDraining, EngineLoading, ServiceUnavailable
from nanogpt.settings import Settings
from nanogpt.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from nanogpt.engine.client import EngineClient, EngineStatus


@dataclass(frozen=True)
class ServedModel:
    """What a worker knows of the model: the engine told it."""

    name: str
    card: dict[str, Any]
    tokenizer: Tokenizer


class EngineHandle:
    """Hands out the process's client, and the model that it found. Safe to share between threads."""

    def __init__(self, settings: Settings, client: EngineClient | None = None) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._client = client
        self._pid = os.getpid()
        self._model: tuple[Any, ServedModel] | None = None

    @property
    def client(self) -> EngineClient:
        if self._client is None or self._pid != os.getpid():
            with self._lock:
                if self._client is None or self._pid != os.getpid():
                    from nanogpt.engine.client import EngineClient
                    from nanogpt.engine.launch import ensure_supervisor

                    self._client = EngineClient(ensure_supervisor(self._settings))
                    self._pid = os.getpid()
        return self._client

    def state(self) -> EngineStatus:
        return self.client.state()

    def model(self) -> ServedModel:
        """The model, as soon as the engine has it. Raises: ServiceUnavailable when that takes too long."""
        status = self.client.wait_ready(self._settings.engine_wait_s)
        if status.state == "loading":
            raise EngineLoading("The model is still loading.", remedy="Try again shortly.")
        if status.state == "draining":
            raise EngineDraining("The server is shutting down.", remedy="Send the request again.")
        if status.state != "ready":
            raise ServiceUnavailable(status.reason or "The model cannot be served.", retry_after_s=5.0)
        known = self._model
        if known is None or known[0] is not status.tokenizer:
            from nanogpt.tokenizer import tokenizer_from_spec

            tokenizer = tokenizer_from_spec(status.tokenizer)
            known = self._model = (status.tokenizer, ServedModel(status.card["name"], status.card, tokenizer))
        return known[1]
