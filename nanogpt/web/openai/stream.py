"""What OpenAI's streams have in common: chunks for each choice as they come, usage, ``[DONE]``, errors as an event."""

from __future__ import annotations

from typing import Any, ClassVar

from flask import g

from nanogpt.errors import NanoGPTError
from nanogpt.web.answers import event
from nanogpt.web.generation import TextGeneration
from nanogpt.web.group import TextGroup
from nanogpt.web.openai.errors import openai_error
from nanogpt.web.openai.job import Job

DONE = b"data: [DONE]\n\n"


def answer_head(job: Job, prefix: str, kind: str) -> dict[str, Any]:
    """The fields that every answer and every chunk begins with."""
    return {
        "id": f"{prefix}-{g.request_id}",
        "object": kind,
        "created": job.created,
        "model": job.model.name,
        "system_fingerprint": f"fp_{job.model.digest[:12]}",
    }


def finish_reason(text: TextGeneration, *, discards: bool = False) -> str | None:
    """OpenAI knows no ``abort``: a text that its deadline cut is one that was too long."""
    if discards or text.finish_reason == "abort":
        return "length"
    return text.finish_reason


class OpenAIForm:
    """The form of one stream. ``choice`` is what completions and chats do differently."""

    head: ClassVar[tuple[str, str]]

    def __init__(self, job: Job, group: TextGroup, *, include_usage: bool, continuous_usage: bool) -> None:
        self.job = job
        self.group = group
        self._head = answer_head(job, *self.head)
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._continuous_usage = continuous_usage
        self._begun = [False] * len(group.texts)
        self._told = [0] * len(group.texts)

    def choice(self, index: int, piece: str, *, first: bool, told: int) -> list[dict[str, Any]]:
        """The chunks' choices for a piece, or for the end of a text (the piece is empty). ``told``: how many of its
        tokens earlier chunks had."""
        raise NotImplementedError

    def piece(self, piece: tuple[int, str]) -> bytes:
        index, text = piece
        choices = self.choice(index, text, first=not self._begun[index], told=self._told[index])
        if choices:
            self._begun[index] = True
            self._told[index] = len(self.group.texts[index].token_ids)
        usage = {"usage": self.job.usage(self.group)} if self._continuous_usage else self._usage
        return b"".join(event({**self._head, "choices": [choice], **usage}) for choice in choices)

    def end(self) -> bytes:
        if not self._usage:
            return DONE
        return event({**self._head, "choices": [], "usage": self.job.usage(self.group)}) + DONE

    def error(self, error: NanoGPTError, request_id: str) -> bytes:
        self.job.name_field(error)
        return event(openai_error(error))
