"""This worker process's way to an engine: one client, made by the first thread that needs it.

Made lazily and once a process: the app may be imported before gunicorn forks (``--preload``), and a client's thread
and socket do not outlive a fork. Where nobody has started the engine (gunicorn without our configuration,
``flask run``), the client starts it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from nanogpt._version import __version__
from nanogpt.engine.client import EngineClient, EngineStatus, refusal
from nanogpt.engine.history import Role
from nanogpt.settings import Settings
from nanogpt.tokenizer import tokenizer_from_spec
from nanogpt.tokenizer.base import Tokenizer

# How long the first caller in a process waits for the engine's first words.
_CONNECT_S = 0.5


@dataclass(frozen=True)
class ServedModel:
    """What a worker knows of the model: the engine told it."""

    name: str
    tokenizer: Tokenizer
    handle: EngineHandle = field(repr=False, compare=False)
    digest: str = ""
    engine: int | None = None
    """Whose model this is (``EngineStatus.link``): tokens of this tokenizer go to that engine and to no other."""
    card: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    """Of all that a text depends on beside its request: equal fingerprints write equal texts. Empty: not known."""


class EngineHandle:
    """Hands out the process's client, and the model that it found. Safe to share between threads."""

    def __init__(self, settings: Settings, client: EngineClient | None = None, role: Role = "main") -> None:
        self._settings = settings
        self._role = role
        self._lock = threading.Lock()
        self._client = client
        self._pid = os.getpid()
        self._spec: dict[str, Any] | None = None
        self._model: ServedModel | None = None

    @property
    def client(self) -> EngineClient:
        if self._client is None or self._pid != os.getpid():
            with self._lock:
                if self._client is None or self._pid != os.getpid():
                    client = EngineClient(self._settings, role=self._role)
                    # An engine that is up says so at once: the first caller need not be told that it is loading.
                    client.wait_ready(_CONNECT_S)
                    self._client, self._pid = client, os.getpid()
        return self._client

    def state(self) -> EngineStatus:
        """How the engine is, without waiting."""
        return self.client.state()

    def model(self) -> ServedModel:
        """The model, as soon as the engine has it. Raises: ServiceUnavailable when it does not come in time."""
        status = self.client.wait_ready()
        if status.state != "ready" or status.tokenizer is None or status.model is None:
            raise refusal(status)
        model = self._model
        if model is None or self._spec is not status.tokenizer or model.engine != status.link:
            with self._lock:
                # Another engine has said hello: its tokenizer is made once, however many requests wait for it, and not
                # at all when it is the same as the one before's.
                model = self._model
                if model is None or self._spec is not status.tokenizer or model.engine != status.link:
                    same = model is not None and self._spec == status.tokenizer
                    tokenizer = model.tokenizer if model and same else tokenizer_from_spec(status.tokenizer)
                    model = ServedModel(
                        status.model,
                        tokenizer,
                        self,
                        status.digest or "",
                        status.link,
                        status.card or {},
                        fingerprint(status),
                    )
                    self._model, self._spec = model, status.tokenizer
        return model


# What the card says of the file. The rest of it is the architecture, which is as much a part of a text as the weights.
_OF_THE_FILE = frozenset(
    {"name", "family", "path", "file_bytes", "step", "recorded_loss", "weights_bytes", "dtype", "tokenizer"}
    | {"chat_template", "notes"}
)


def fingerprint(status: EngineStatus) -> str:
    """See ServedModel.fingerprint. This version of the program counts, too: it may compute or draw differently."""
    if not status.digest:
        return ""
    architecture = {name: value for name, value in sorted((status.card or {}).items()) if name not in _OF_THE_FILE}
    arithmetic = [status.device, status.runner, status.precision]
    parts = [__version__, status.digest, architecture, arithmetic, status.tokenizer]
    return hashlib.sha256(msgpack.packb(parts)).hexdigest()
