"""A refusal in OpenAI's form, as its clients expect it on every route under ``/v1/``."""

from __future__ import annotations

from typing import Any

from nanogpt.errors import NanoGPTError


def is_openai(path: str) -> bool:
    """Whether a path is one of OpenAI's, or would be."""
    return path == "/v1" or path.startswith("/v1/")


def openai_error(error: NanoGPTError) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``; the message says the remedy, too."""
    if error.status == 429:
        kind = "rate_limit_error"
    else:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
    message = error.message
    if error.remedy:
        message += f" {error.remedy}" if message.endswith((".", "!", "?")) else f". {error.remedy}"
    return {"error": {"message": message, "type": kind, "param": error.field, "code": error.code}}
