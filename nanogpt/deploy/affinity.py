"""Which requests should meet in the same replica: those of one session, else those whose prompts begin alike.

A replica that has computed a prompt keeps its K and V (and, where answers must repeat, the answer): requests that share
a beginning are cheaper together. Nothing depends on it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from nanogpt.deploy.exchange import Request

SESSION_HEADER = "x-session-id"
# Prompts that share so many characters have their beginning in common; a shorter prompt counts as a whole.
PREFIX_CHARS = 128


def affinity_key(request: Request) -> str:
    """Equal for requests that belong together; empty where nothing is known. A digest: nobody's prompt is in it."""
    if request.method != "POST":
        return ""
    session = request.header(SESSION_HEADER)
    text = f"session {session}" if session else _beginning(request.body)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest() if text else ""


def _beginning(body: bytes) -> str:
    """How a prompt begins; of several, the first one. Bodies that are no good are the replica's to refuse."""
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(fields, dict):
        return ""
    if "messages" in fields:
        messages = fields["messages"] if isinstance(fields["messages"], list) else []
        said = [message.get("content") for message in messages if isinstance(message, dict)]
        text = "\n".join(content if isinstance(content, str) else json.dumps(content) for content in said)
        return f"chat {text[:PREFIX_CHARS]}"
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list):  # of token ids
        return f"ids {prompt[: PREFIX_CHARS // 4]}"
    return f"text {prompt[:PREFIX_CHARS]}" if isinstance(prompt, str) else ""
