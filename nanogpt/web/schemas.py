"""What a client may ask: the fields of a request, their types and limits, and the words in which they are refused.

The models are the single source for validation and for the API's description. Knows nothing of HTTP or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from nanogpt.errors import InvalidRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.web.fields import Biases, Fields, Text, nearest_field, read_fields, sampling_params

# Alternatives that a token can be reported with.
MAX_LOGPROBS = 20

# What other servers call our fields; difflib alone would not find them.
_KNOWN_ELSEWHERE = {
    "max_tokens": "max_length",
    "max_new_tokens": "max_length",
    "max_completion_tokens": "max_length",
    "n_predict": "max_length",
    "length": "max_length",
    "text": "prompt",
    "input": "prompt",
    "inputs": "prompt",
    "stop_sequences": "stop",
    "repeat_penalty": "repetition_penalty",
}


class GenerateBody(Fields):
    """The body of POST /generate: the guide's four fields first."""

    prompt: str = Field(description="The text to continue.")
    max_length: int = Field(100, ge=1, description="New tokens at most.")
    temperature: float = Field(
        0.8, ge=0.0, le=2.0, description="Randomness; 0.1 to 1.0 is usual. 0 always takes the most probable token."
    )
    top_k: int = Field(50, ge=0, le=2**31 - 1, description="Sample among the k most probable tokens. 0: all.")
    top_p: float = Field(
        1.0, ge=0.0, le=1.0, description="Sample among the fewest tokens whose probabilities add up to p."
    )
    min_p: float = Field(
        0.0, ge=0.0, le=1.0, description="Drop tokens less probable than min_p times the most probable one."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1, description="The same seed gives the same text.")
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = Field(
        None, description="Text or texts that end the answer; they are not part of it."
    )
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=100.0, description="Above 1: tokens seen before are less likely."
    )
    presence_penalty: float = Field(0.0, ge=-100.0, le=100.0, description="Subtracted once for a token of the answer.")
    frequency_penalty: float = Field(
        0.0, ge=-100.0, le=100.0, description="Subtracted for every time that a token is in the answer."
    )
    logit_bias: Biases | None = Field(None, description="Added to the logits: token id to bias.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Report each token with its log probability, and with so many of the most probable ones.",
    )
    model: str = Field("default", max_length=1000, description="The name of a served model, or default.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    cache: bool = Field(True, description="Whether an identical answer that is there already may be used.")

    @classmethod
    def parse(cls, fields: Mapping[str, Any], settings: Settings) -> GenerateBody:
        """The body as asked, within this server's limits. Raises: InvalidRequest with the guide's messages."""
        # In the guide's order, and before anything else is found fault with.
        prompt = fields.get("prompt")
        if prompt is None or prompt == "":
            unknown = next((name for name in fields if name not in cls.model_fields), None)
            raise InvalidRequest(
                "Prompt is required",
                field="prompt",
                remedy=unknown and nearest_field(unknown, cls.model_fields, _KNOWN_ELSEWHERE),
            )
        if isinstance(prompt, str) and len(prompt) > settings.max_prompt_chars:
            raise InvalidRequest(
                "Prompt too long",
                field="prompt",
                remedy=f"It has {len(prompt)} characters; this server admits {settings.max_prompt_chars}.",
            )
        body = read_fields(cls, fields, _KNOWN_ELSEWHERE)
        if body.max_length > settings.max_new_tokens:
            raise InvalidRequest(
                "max_length too large",
                field="max_length",
                remedy=f"It is {body.max_length}; this server admits {settings.max_new_tokens}.",
            )
        return body

    def sampling_params(self) -> SamplingParams:
        return sampling_params(self, max_tokens=self.max_length, logprobs=self.logprobs)
