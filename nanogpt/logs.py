"""The log of every process of the server: the guide's format, or one JSON object a line.

Each process calls ``configure`` once at its start; everything logs through ``logging.getLogger("nanogpt…")``. One
record is one line whatever a client put into it: control characters are escaped. What may be logged is decided where
it is logged; this module only writes.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime, timezone
from typing import Any

TEXT_FORMAT = "%(asctime)s - %(levelname)s - %(message)s"

# C0 and C1 controls, and the separators that some viewers take for the end of a line.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(text: str) -> str:
    """The text with every control character escaped, so that nobody can forge a line of the log."""
    return _CONTROLS.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


class TextFormatter(logging.Formatter):
    """The guide's format. A traceback follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__(TEXT_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One object a line: ``time level message pid`` and whatever the record carries in ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "pid": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def make_formatter(log_format: str) -> logging.Formatter:
    return JsonFormatter() if log_format == "json" else TextFormatter()


def configure(log_format: str = "text", log_level: str = "info") -> None:
    """Send this process's log to stderr. Calling it again replaces the former configuration.

    The package logs from ``log_level`` on, everything else from warnings on.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(log_format))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nanogpt").setLevel(log_level.upper())
