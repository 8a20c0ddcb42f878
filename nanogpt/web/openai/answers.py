"""What OpenAI's routes and the tokenizer's answer with, field by field: for the API's description and its tests.

Answers are built as plain dictionaries, which is faster; tests hold the two together.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nanogpt.web.guide_answers import Answer


class OpenAIErrorObject(Answer):
    message: str = Field(description="What is wrong, and what to do about it.")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error.")
    param: str | None = Field(description="The field at fault.")
    code: str = Field(description="As in the table of error codes.")


class OpenAIRefusal(Answer):
    error: OpenAIErrorObject


class PromptTokensDetails(Answer):
    cached_tokens: int = Field(description="Tokens of the prompts that were computed before.")


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int = Field(description="All that was generated, answered with or not (best_of).")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Characters of the choice before each token.")


class CompletionChoice(Answer):
    index: int = Field(description="n choices for the first prompt, then n for the second, …")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Of the weights.")
    choices: list[CompletionChoice]
    usage: Usage


class ChatTopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Of the weights.")
    choices: list[ChatChoice]
    usage: Usage


class ModelObject(Answer):
    id: str
    object: Literal["model"]
    created: int = Field(description="Seconds since 1970: when this server started.")
    owned_by: str
    max_model_len: int | None = Field(description="The context, in tokens.")
    digest: str | None = Field(description="SHA-256 of the weights.")


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelObject]


class TokenizeAnswer(Answer):
    tokens: list[int]
    count: int
    max_model_len: int | None = Field(description="The context, in tokens.")
    token_strs: list[str] | None = Field(None, description="With return_token_strs.")


class DetokenizeAnswer(Answer):
    prompt: str


class TokenizerInfo(Answer):
    model: str
    tokenizer_class: str = Field(description="gpt2, characters, tokenizer.json, vocab.json or llm.c.")
    vocab_size: int
    max_model_len: int | None = Field(description="The context, in tokens.")
    eos_token: str | None = Field(description="null for a character model.")
    eos_token_id: int | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None = Field(description="Jinja; null: the conversation is written as a transcript.")
