"""POST /v1/chat/completions: a conversation goes on, in the form that the checkpoint was taught or as a transcript."""

from __future__ import annotations

import re
import secrets
from contextlib import ExitStack
from functools import partial
from typing import Any

from flask import Response, request

from nanogpt.chat_template import PLAIN, PLAIN_STOPS, render
from nanogpt.tokenizer.base import empty_prompt
from nanogpt.web.body import read_json_object
from nanogpt.web.engine import ServedModel
from nanogpt.web.generation import TextGeneration
from nanogpt.web.group import TextGroup
from nanogpt.web.openai.job import Job, check_size, room_for
from nanogpt.web.openai.respond import respond
from nanogpt.web.openai.schemas import ChatBody, Message
from nanogpt.web.openai.stream import OpenAIForm, answer_head, finish_reason
from nanogpt.web.service import GenerationService
from nanogpt.web.token_logprobs import chat_logprobs


def chat_completions(service: GenerationService) -> Response:
    body = ChatBody.parse(read_json_object(request, service.settings.max_body_bytes), service.settings)
    with ExitStack() as held:
        held.enter_context(service.place())
        model = service.model(body.model)
        prompt = prompt_token_ids(model, body.messages)
        room = room_for(prompt, model, service.settings, "messages")
        job = make_job(body, model, prompt, body.wanted_tokens or room)
        check_size(job, service.settings, "messages")
        form = partial(ChatForm, body, job) if body.stream else None
        return respond(service, job, held, cache=body.cache, form=form, answer=partial(chat_answer, body, job))


def prompt_token_ids(model: ServedModel, messages: list[Message]) -> list[int]:
    """The conversation as the model reads it, up to where the next answer begins.

    Special tokens are the template's to write. Where a message holds one it stays text, or a user could speak as
    somebody else.

    Raises: InvalidRequest, UnknownCharacter.
    """
    tokenizer = model.tokenizer
    template = model.card.get("chat_template")
    hidden: dict[str, str] = {}
    said = []
    for message in messages:
        content = message.content
        if template and tokenizer.encode(content, allow_special=True) != tokenizer.encode(content):
            hidden[stand_in := secrets.token_hex(16)] = content
            content = stand_in
        said.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    if not template:
        return tokenizer.encode(render(PLAIN, said, end_of_text=""))
    end_of_text = "" if tokenizer.eos_token_id is None else tokenizer.decode([tokenizer.eos_token_id])
    text = render(template, said, end_of_text=end_of_text)
    token_ids: list[int] = []
    for piece in re.split(f"({'|'.join(hidden)})", text) if hidden else [text]:
        token_ids += tokenizer.encode(hidden[piece]) if piece in hidden else tokenizer.encode(piece, allow_special=True)
    return token_ids or empty_prompt(tokenizer)


def make_job(body: ChatBody, model: ServedModel, prompt: list[int], max_tokens: int) -> Job:
    params = body.sampling_params(
        max_tokens,
        more_stops=PLAIN_STOPS if is_plain(model) else (),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return Job(model, [prompt], params, body.n, body.n, grammar_field=body.grammar_field)


def is_plain(model: ServedModel) -> bool:
    """Whether the model was never taught a form of conversation: it writes a transcript."""
    return not model.card.get("chat_template")


def chat_answer(body: ChatBody, job: Job, group: TextGroup) -> dict[str, Any]:
    choices = []
    for index, text in enumerate(group.texts):
        content = "" if text.outcome is None else text.outcome.text
        choices.append(
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": content.strip() if is_plain(job.model) else content,
                    "refusal": None,
                },
                "logprobs": choice_logprobs(body, text),
                "finish_reason": finish_reason(text),
            }
        )
    return {**answer_head(job, "chatcmpl", "chat.completion"), "choices": choices, "usage": job.usage(group)}


def choice_logprobs(body: ChatBody, text: TextGeneration, told: int = 0) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return {"content": chat_logprobs(text.tokenizer, text.token_ids[told:], text.logprobs[told:]), "refusal": None}


class ChatForm(OpenAIForm):
    """A stream's chunks: the role, each piece of a choice, its finish_reason."""

    head = ("chatcmpl", "chat.completion.chunk")

    def __init__(self, body: ChatBody, job: Job, group: TextGroup) -> None:
        super().__init__(job, group, include_usage=body.include_usage, continuous_usage=body.continuous_usage)
        self._body = body
        self._strips = [Strip() for _ in group.texts] if is_plain(job.model) else None

    def choice(self, index: int, piece: str, *, first: bool, told: int) -> list[dict[str, Any]]:
        text = self.group.texts[index]
        content = self._strips[index].push(piece) if self._strips is not None else piece
        ended = text.finish_reason is not None
        if not (content or ended):
            return []
        logprobs = choice_logprobs(self._body, text, told)
        choices: list[dict[str, Any]] = []
        if first:
            delta = {"role": "assistant", "content": "", "refusal": None}
            choices.append({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        if content:
            choices.append({"index": index, "delta": {"content": content}, "logprobs": logprobs, "finish_reason": None})
            logprobs = None
        if ended:
            reason = finish_reason(text)
            choices.append({"index": index, "delta": {}, "logprobs": logprobs, "finish_reason": reason})
        return choices


class Strip:
    """``str.strip`` for a text that comes in pieces: white space is held back until something follows it."""

    def __init__(self) -> None:
        self._begun = False
        self._held = ""

    def push(self, piece: str) -> str:
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        certain = text.rstrip()
        self._held = text[len(certain) :]
        return certain
