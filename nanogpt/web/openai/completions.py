"""POST /v1/completions: prompts go on, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from flask import Response, request

from nanogpt.errors import EngineDied
from nanogpt.sampling_params import TokenLogprobs
from nanogpt.tokenizer.text import TextStream
from nanogpt.web.body import read_json_object
from nanogpt.web.engine import ServedModel
from nanogpt.web.generation import TextGeneration
from nanogpt.web.group import TextGroup
from nanogpt.web.openai.job import Job, check_size, encode
from nanogpt.web.openai.respond import respond
from nanogpt.web.openai.schemas import CompletionBody
from nanogpt.web.openai.stream import OpenAIForm, answer_head, finish_reason
from nanogpt.web.service import GenerationService
from nanogpt.web.token_logprobs import completion_logprobs


def completions(service: GenerationService) -> Response:
    body = CompletionBody.parse(read_json_object(request, service.settings.max_body_bytes), service.settings)
    with ExitStack() as held:
        held.enter_context(service.place())
        model = service.model(body.model)
        job = make_job(body, model)
        check_size(job, service.settings, "prompt")
        form = partial(CompletionForm, body, job) if body.stream else None
        return respond(service, job, held, cache=body.cache, form=form, answer=partial(completion_answer, body, job))


def make_job(body: CompletionBody, model: ServedModel) -> Job:
    logprobs = body.logprobs
    if logprobs is None and body.candidates > body.n:
        logprobs = 0  # to know the best
    prompt_logprobs = body.logprobs if body.echo else None
    return Job(
        model,
        [encode(model.tokenizer, prompt) for prompt in body.prompt],
        # The engine generates at least one token.
        body.sampling_params(max(1, body.max_tokens), logprobs=logprobs, prompt_logprobs=prompt_logprobs),
        body.n,
        body.candidates,
        discards=body.max_tokens == 0,
        grammar_field=body.grammar_field,
    )


def completion_answer(body: CompletionBody, job: Job, group: TextGroup) -> dict[str, Any]:
    choices = []
    for index, text in enumerate(job.chosen(group)):
        which = index // job.n
        prompt, token_ids = prompt_text(body, job, which) if body.echo else "", job.prompts[which]
        choices.append(
            {
                "index": index,
                "text": prompt + ("" if job.discards or text.outcome is None else text.outcome.text),
                "logprobs": choice_logprobs(body, job, text, prompt, token_ids),
                "finish_reason": finish_reason(text, discards=job.discards),
            }
        )
    head = answer_head(job, "cmpl", "text_completion")
    return {**head, "choices": choices, "usage": job.usage(group)}


def prompt_text(body: CompletionBody, job: Job, which: int) -> str:
    prompt = body.prompt[which]
    return prompt if isinstance(prompt, str) else job.model.tokenizer.decode(prompt)


def choice_logprobs(
    body: CompletionBody, job: Job, text: TextGeneration, prompt: str, token_ids: Sequence[int]
) -> dict[str, list[Any]] | None:
    """Those of the prompt (with echo) and of the new tokens; offsets count from the beginning of the choice."""
    if body.logprobs is None:
        return None
    ids: list[int] = []
    logprobs: list[TokenLogprobs | None] = []
    offsets: list[int] = []
    if body.echo:
        if text.outcome is None or text.outcome.prompt_logprobs is None:
            raise EngineDied("The engine ended while it worked on this request.", remedy="Send the request again.")
        before = TextStream(job.model.tokenizer)
        before.push(token_ids)
        ids, logprobs, offsets = list(token_ids), list(text.outcome.prompt_logprobs), list(before.offsets)
    if not job.discards:
        ids += text.token_ids
        logprobs += text.logprobs
        offsets += [len(prompt) + offset for offset in text.offsets]
    return completion_logprobs(job.model.tokenizer, ids, logprobs, offsets)


class CompletionForm(OpenAIForm):
    """A stream's chunks: each piece of a choice, then its finish_reason."""

    head = ("cmpl", "text_completion")

    def __init__(self, body: CompletionBody, job: Job, group: TextGroup) -> None:
        super().__init__(job, group, include_usage=body.include_usage, continuous_usage=body.continuous_usage)
        self._body = body

    def choice(self, index: int, piece: str, *, first: bool, told: int) -> list[dict[str, Any]]:
        text = self.group.texts[index]
        prompt = prompt_text(self._body, self.job, index // self.job.n) if first and self._body.echo else ""
        if self.job.discards:
            piece = ""
        ended = text.finish_reason is not None
        if not (prompt or piece or ended):
            return []
        logprobs = None
        if self._body.logprobs is not None and not self.job.discards:
            logprobs = completion_logprobs(
                self.job.model.tokenizer, text.token_ids[told:], text.logprobs[told:], text.offsets[told:]
            )
        return [
            {
                "index": index,
                "text": prompt + piece,
                "logprobs": logprobs,
                "finish_reason": finish_reason(text, discards=self.job.discards) if ended else None,
            }
        ]
