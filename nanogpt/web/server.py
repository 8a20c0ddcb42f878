"""Our server without gunicorn's command line: ``nanogpt serve``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from flask import Flask
from gunicorn.app.base import BaseApplication

from nanogpt.settings import Settings
from nanogpt.web import gunicorn_hooks
from nanogpt.web.app import create_app


class Server(BaseApplication):  # type: ignore[misc]
    """gunicorn, configured by our settings alone. ``load`` loads them, at the start and again on SIGHUP."""

    def __init__(self, load: Callable[[], Settings]) -> None:
        self._load = load
        super().__init__()

    def load_config(self) -> None:
        settings = gunicorn_hooks.load_settings(self._load)
        for name, value in gunicorn_hooks.configuration(settings).items():
            if name in self.cfg.settings:  # not every version of gunicorn has them all
                self.cfg.set(name, value)

    def load(self) -> Flask:
        return create_app()


def serve(load: Callable[[], Settings]) -> NoReturn:
    """Serve until a signal ends it."""
    Server(load).run()
    raise AssertionError("gunicorn ends by SystemExit")
