"""gunicorn's own messages in our format, without the parts of requests that it quotes in them."""

from __future__ import annotations

import logging
import sys
from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger

from nanogpt import logs
from nanogpt.settings import Settings
from nanogpt.web import process


class GunicornLogger(Logger):  # type: ignore[misc]
    """Set as gunicorn's ``logger_class``. Where gunicorn logs to a file (``--log-file``), so does the app."""

    def setup(self, cfg: Config) -> None:
        super().setup(cfg)
        settings = process.settings or Settings()
        logs.configure(settings.log_format, settings.log_level)
        for handler in self.error_log.handlers:
            handler.setFormatter(logs.make_formatter(settings.log_format))
        if cfg.errorlog not in (None, "-"):
            logging.getLogger().handlers[:] = self.error_log.handlers

    def debug(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: what gunicorn tells at this level quotes addresses and bytes of requests."""

    def warning(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        # "Invalid request from ip=…: …" goes on with the header or the line at fault, which may hold a key.
        if str(msg).startswith("Invalid request from ip="):
            msg, args = "%s: %s", (str(msg).partition(": ")[0], type(sys.exc_info()[1]).__name__)
        super().warning(msg, *args, **kwargs)

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """gunicorn calls this for what goes wrong around the app, and quotes the address that was asked for."""
        error = sys.exc_info()[1]
        if isinstance(error, TimeoutError):
            self.info("A client sent or took nothing for too long; its connection is closed.")
        elif str(msg).startswith(("Error handling request", "Socket error")):
            self.error("%s, %s", str(msg).partition(" %s")[0], type(error).__name__)
        else:
            super().exception(msg, *args, **kwargs)
