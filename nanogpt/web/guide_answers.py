"""What the guide's routes answer with, field by field: for the API's description and its tests."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)


class Refusal(Answer):
    error: str = Field(description="What is wrong.")
    code: str = Field(description="As in the table of error codes.")
    request_id: str
    field: str | None = Field(None, description="The field at fault.")
    remedy: str | None = Field(None, description="What to do about it.")


class TokenUsage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = Field(description="Tokens of the prompt that were computed before.")


class GenerateTimings(Answer):
    queue_s: float
    ttft_s: float = Field(description="Until the first token.")
    total_s: float
    tokens_per_second: float = Field(description="After the first token.")


class TopToken(Answer):
    id: int
    text: str
    logprob: float


class GeneratedToken(TopToken):
    rank: int = Field(description="1 for the most probable token.")
    top: list[TopToken]


class GenerateAnswer(Answer):
    prompt: str
    generated_text: str = Field(description="The prompt and its continuation.")
    tokens_generated: int
    finish_reason: Literal["stop", "length", "abort"]
    model: str
    usage: TokenUsage
    timings: GenerateTimings
    logprobs: list[GeneratedToken] | None = Field(None, description="With logprobs.")


class Health(Answer):
    status: Literal["healthy", "loading", "draining", "unhealthy"]
    model_loaded: bool
    device: str | None
    reason: str | None = Field(None, description="Where it is not healthy.")
    compare: Literal["healthy", "loading", "draining", "unhealthy"] | None = Field(
        None, description="How the second model is, where there is one."
    )


class Ready(Answer):
    ready: bool
    reason: str | None = None


class ModelInfo(Answer):
    """What a checkpoint does not record is null."""

    name: str
    family: str | None = Field(description="Of the file's form: nanogpt, build-nanogpt, llm.c, huggingface.")
    parameters: int | None
    context: int | None = Field(description="In tokens.")
    layers: int | None
    heads: int | None
    width: int | None
    vocabulary: int | None = Field(description="Tokens, without padding.")
    tokenizer: str | None
    has_chat_template: bool = Field(description="Whether it was taught a form of conversation.")
    step: int | None = Field(description="Of its training.")
    recorded_loss: float | None = Field(description="As its training recorded it.")
    device: str | None
    precision: str | None = Field(description="Arithmetic of the weights.")
    int8_matrices: list[str] | None = Field(
        description="Under int4: the matrices that stay in int8, as nanogpt quantize planned it."
    )
    runner: str | None
    digest: str | None = Field(description="SHA-256 of the weights.")


class Index(Answer):
    name: str
    version: str
    routes: dict[str, str]
