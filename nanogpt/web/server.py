"""Our server without gunicorn's command line: ``nanogpt serve`` and ``python -m web.serve``."""

from __future__ import annotations

from flask import Flask
from gunicorn.app.base import BaseApplication

from nanogpt.settings import Settings
from nanogpt.web import gunicorn_hooks
from nanogpt.web.app import create_app


class Server(BaseApplication):  # type: ignore[misc]
    """gunicorn, configured by our settings alone."""

    def __init__(self, settings: Settings | None) -> None:
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        """Also called on SIGHUP: the environment and the settings file are then read again."""
        settings, self._settings = gunicorn_hooks.load_settings(self._settings), None
        for name, value in gunicorn_hooks.configuration(settings).items():
            if name in self.cfg.settings:  # not every version of gunicorn has them all
                self.cfg.set(name, value)

    def load(self) -> Flask:
        return create_app()


def serve(settings: Settings | None = None) -> None:
    """Serve until a signal ends it. Without settings: those of the environment. Raises: SystemExit, always."""
    Server(settings).run()
