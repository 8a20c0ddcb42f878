"""What one request of OpenAI's API asks of the engine: which texts, with which seeds, and how they are counted.

Everything is bounded here, before the first of them is handed over. Knows no route and no form of answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanogpt.errors import ContextLengthExceeded, InvalidRequest, NanoGPTError
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.tokenizer.base import Tokenizer, empty_prompt
from nanogpt.web.engine import ServedModel
from nanogpt.web.generation import TextGeneration
from nanogpt.web.group import TextGroup

_SEEDS = 2**64


@dataclass(frozen=True)
class Job:
    """``candidates`` texts for each prompt, ``n`` of which are answered with."""

    model: ServedModel
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    n: int = 1
    candidates: int = 1
    discards: bool = False
    """The new tokens are computed for the prompt's sake alone (max_tokens 0): they are neither shown nor counted."""
    grammar_field: str = "response_format"
    """The field of the request that the grammar comes from, if there is one."""
    created: int = field(default_factory=lambda: int(time.time()))

    def texts(self) -> list[tuple[Sequence[int], SamplingParams]]:
        """What goes to the engine: prompt by prompt, candidate by candidate."""
        params = [self._seeded(i) for i in range(self.candidates)]
        return [(prompt, each) for prompt in self.prompts for each in params]

    def name_field(self, error: NanoGPTError) -> None:
        """Where the engine finds fault with the grammar: the request's own word for it."""
        if error.field == "grammar":
            error.field = self.grammar_field

    def _seeded(self, index: int) -> SamplingParams:
        """Candidate i has the seed + i, so that each can be had again alone."""
        seed = self.params.seed
        if seed is None or index == 0:
            return self.params
        return replace(self.params, seed=(seed + index) % _SEEDS)

    def chosen(self, group: TextGroup) -> list[TextGeneration]:
        """The answer's texts in the order of its choices: for each prompt the n of the highest mean log probability."""
        if self.n == self.candidates:
            return group.texts
        chosen = []
        for start in range(0, len(group.texts), self.candidates):
            best = sorted(group.texts[start : start + self.candidates], key=_mean_logprob, reverse=True)
            chosen += best[: self.n]
        return chosen

    def usage(self, group: TextGroup) -> dict[str, Any]:
        """Each prompt is counted once, and all that was generated, answered with or not."""
        prompt_tokens = sum(map(len, self.prompts))
        completion_tokens = 0 if self.discards else group.num_tokens
        firsts = [text.outcome for text in group.texts[:: self.candidates]]
        cached_tokens = sum(outcome.num_cached_tokens for outcome in firsts if outcome is not None)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }


def _mean_logprob(text: TextGeneration) -> float:
    values = [item.logprob for item in text.logprobs]
    return sum(values) / len(values) if values else 0.0


def encode(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    """A prompt's token ids. Raises: InvalidRequest, UnknownCharacter."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt) or empty_prompt(tokenizer)
    check_ids(tokenizer, prompt, "prompt")
    return prompt


def check_ids(tokenizer: Tokenizer, token_ids: Sequence[int], field: str) -> None:
    for i, token_id in enumerate(token_ids):
        if not 0 <= token_id < tokenizer.num_tokens:
            raise InvalidRequest(
                f"Token {i} of {field} is {token_id}; this model's ids go from 0 to {tokenizer.num_tokens - 1}.",
                field=field,
            )


def room_for(prompt: Sequence[int], model: ServedModel, settings: Settings, field: str) -> int:
    """How many new tokens the context and the server admit after this prompt. Raises: ContextLengthExceeded."""
    context: int | None = model.card.get("block_size")
    if context is None or settings.context_overflow == "crop":
        return settings.max_new_tokens
    if len(prompt) > context:
        what = "the prompt has" if field == "prompt" else f"the {field} have"
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens, but {what} {len(prompt)}.",
            field=field,
            remedy="Send less, or start the server with NANOGPT_CONTEXT_OVERFLOW=crop.",
        )
    return min(settings.max_new_tokens, context - len(prompt) + 1)


def check_size(job: Job, settings: Settings, field: str) -> None:
    """One request must not take the whole server. Raises: InvalidRequest, ContextLengthExceeded."""
    num_texts = len(job.prompts) * job.candidates
    limit = min(settings.max_sequences_per_request, settings.max_batch_size + settings.max_queue)
    if num_texts > limit:
        raise InvalidRequest(
            f"The request asks for {num_texts} texts (prompts times n or best_of); this server admits {limit}.",
            field="n" if job.candidates > 1 else field,
            remedy="Send several requests, or raise NANOGPT_MAX_SEQUENCES_PER_REQUEST.",
        )
    new = [min(job.params.max_tokens, room_for(prompt, job.model, settings, field)) for prompt in job.prompts]
    # A token that is reported with k others is as much of an answer as 1 + k tokens.
    reported = 1 + (job.params.logprobs or 0), 1 + (job.params.prompt_logprobs or 0)
    num_tokens = job.candidates * (sum(new) * reported[0] + sum(map(len, job.prompts)) * reported[1])
    if num_tokens > settings.max_tokens_per_request:
        told = "prompts, new ones and those of logprobs" if max(reported) > 1 else "prompts and new ones"
        raise InvalidRequest(
            f"The request asks for {num_tokens} tokens, {told}; this server admits {settings.max_tokens_per_request}.",
            field=field,
            remedy="Ask for less, or raise NANOGPT_MAX_TOKENS_PER_REQUEST.",
        )
