"""What an answer says: the text's pieces and when each came, the usage, or how the answer failed.

Understands the streams of OpenAI's completions and chats. Pure: bytes and times in, one ``Outcome`` out.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from nanogpt.bench.http import Answer
from nanogpt.bench.measures import Outcome

_EVENT_END = re.compile(rb"\r?\n\r?\n")
_MAX_KIND_CHARS = 60


def read_answer(answer: Answer, *, began: float, planned: float) -> Outcome:
    """``began``: the run's first moment; ``planned``: when the request was due. Both by ``time.perf_counter``."""
    outcome = Outcome(
        sent_s=answer.started - began, late_s=max(0.0, answer.started - planned), e2e_s=answer.ended - answer.started
    )
    if answer.failure or answer.status != 200:
        outcome.failure = answer.failure or _refusal(answer)
        return outcome
    arrivals, done = [], False
    failure = ""
    for data, at in events(answer):
        if data == b"[DONE]":
            done = True
            continue
        try:
            event = json.loads(data)
        except ValueError:
            failure = failure or "stream: no JSON"
            continue
        if not isinstance(event, dict):
            continue
        if event.get("error"):
            failure = failure or f"stream: {_code(event)}"
        if _text(event):
            arrivals.append(at)
        usage = event.get("usage")
        if isinstance(usage, dict):
            outcome.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            outcome.output_tokens = int(usage.get("completion_tokens") or 0)
    outcome.failure = failure or ("" if done else "stream: no end") or ("" if arrivals else "stream: no text")
    if arrivals:
        outcome.ttft_s = arrivals[0] - answer.started
        outcome.generation_s = arrivals[-1] - arrivals[0]
        outcome.gaps_s.extend(after - before for before, after in itertools.pairwise(arrivals))
        outcome.output_tokens = outcome.output_tokens or len(arrivals)
    return outcome


def events(answer: Answer) -> Iterator[tuple[bytes, float]]:
    """The data of each event, and when its last byte was there."""
    body = bytes(answer.body)
    start = position = 0
    for match in _EVENT_END.finditer(body):
        while answer.ends[position] < match.end():
            position += 1
        lines = body[start : match.start()].splitlines()
        data = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        if data:
            yield b"\n".join(data), answer.times[position]
        start = match.end()


def _text(event: dict[str, Any]) -> bool:
    """Whether the event brings text: not a role, not a reason to end, not the usage."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return True
    return False


def _refusal(answer: Answer) -> str:
    """``429 rate_limited``: the status, and the code where the body has one."""
    try:
        said = json.loads(bytes(answer.body))
    except ValueError:
        said = None
    code = _code(said) if isinstance(said, dict) else ""
    return f"{answer.status} {code}".strip()


def _code(said: dict[str, Any]) -> str:
    error = said.get("error")
    fields = error if isinstance(error, dict) else said
    code = fields.get("code") or fields.get("type") or ""
    return re.sub(r"[^\w.-]+", "_", str(code))[:_MAX_KIND_CHARS] or "error"


def words_of(answer: Answer) -> str:
    """What a refusal says, for people."""
    try:
        said = json.loads(bytes(answer.body))
        error = said.get("error")
        message = error.get("message") if isinstance(error, dict) else error or said.get("message")
        return str(message)[:500]
    except (ValueError, AttributeError):
        return bytes(answer.body[:200]).decode(errors="replace").strip()
