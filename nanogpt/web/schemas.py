"""What a client may ask: the fields of a request, their types and limits, and the words in which they are refused.

The models are the single source for validation and for the API's description. Knows nothing of HTTP or the engine.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanogpt.errors import InvalidRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.web.body import json_type

Text = Annotated[str, Field(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
MAX_BIASES = 1024

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


class GenerateBody(BaseModel):
    """The body of POST /generate: the guide's four fields first."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

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
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="Added to the logits: token id to bias."
    )
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
                "Prompt is required", field="prompt", remedy=unknown and _nearest_field(unknown, cls.model_fields)
            )
        if isinstance(prompt, str) and len(prompt) > settings.max_prompt_chars:
            raise InvalidRequest(
                "Prompt too long",
                field="prompt",
                remedy=f"It has {len(prompt)} characters; this server admits {settings.max_prompt_chars}.",
            )
        bias = fields.get("logit_bias")
        if isinstance(bias, dict) and len(bias) > MAX_BIASES:  # before each of a million is found fault with
            raise InvalidRequest(
                f"logit_bias must have at most {MAX_BIASES} entries, not {len(bias)}.", field="logit_bias"
            )
        try:
            body = cls.model_validate({name: value for name, value in fields.items() if name in cls.model_fields})
        except ValidationError as error:
            raise _refusal(error, cls) from None
        for name in fields:
            if name not in cls.model_fields:
                raise InvalidRequest(
                    f"Unknown field {_shown(name)}.", field=name[:80], remedy=_nearest_field(name, cls.model_fields)
                )
        if body.max_length > settings.max_new_tokens:
            raise InvalidRequest(
                "max_length too large",
                field="max_length",
                remedy=f"It is {body.max_length}; this server admits {settings.max_new_tokens}.",
            )
        return body

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_length,
            logit_bias=_token_ids(self.logit_bias) if self.logit_bias else None,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop=() if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
        )


def _token_ids(bias: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are texts; ids are not. Raises: InvalidRequest for a key that is not a token id."""
    ids = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(
                f"logit_bias has the key {_shown(key)}; its keys must be token ids.", field="logit_bias"
            )
        ids[int(key)] = value
    return ids


def _refusal(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first thing that pydantic found fault with, in our words."""
    details = error.errors(include_url=False)
    field = str(details[0]["loc"][0])
    # A union's members are each found at fault; a length tells more than "not a text".
    of_field = [d for d in details if d["loc"][0] == field]
    detail = next((d for d in of_field if d["type"] not in ("string_type", "list_type")), of_field[-1])
    context, value = detail.get("ctx", {}), detail["input"]
    expected = {
        "string_type": "a text",
        "string_too_short": "a text that is not empty",
        "string_too_long": f"a text of at most {context.get('max_length')} characters",
        "too_long": f"a list of at most {context.get('max_length')} entries",
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "dict_type": "an object of token ids and numbers",
        "greater_than_equal": "",
        "less_than_equal": "",
    }.get(detail["type"])
    if field == "stop" and detail["type"] in ("string_type", "list_type"):
        expected = "a text or a list of texts"
    if not expected:
        expected = _limits(field, model, context)
    name = field if len(detail["loc"]) == 1 or field == "stop" else f"{field} of {_shown(str(detail['loc'][1]))}"
    return InvalidRequest(f"{name} must be {expected}, not {_shown(value)}.", field=field)


def _limits(field: str, model: type[BaseModel], context: Mapping[str, Any]) -> str:
    """``between 0 and 2``, as the model says; where the fault lies deeper (a bias), what pydantic says."""
    bounds: dict[str, Any] = {}
    for constraint in model.model_fields[field].metadata:
        bounds["ge"] = getattr(constraint, "ge", bounds.get("ge"))
        bounds["le"] = getattr(constraint, "le", bounds.get("le"))
    low, high = bounds.get("ge"), bounds.get("le")
    if low is not None and high is not None:
        return f"between {_number(low)} and {_number(high)}"
    if "ge" in context:
        return f"at least {_number(context['ge'])}"
    return f"at most {_number(context['le'])}" if "le" in context else "as the API's description says"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _nearest_field(name: str, known: Mapping[str, Any]) -> str:
    lower = name[:80].lower()
    close = difflib.get_close_matches(lower, known, n=1)
    hint = _KNOWN_ELSEWHERE.get(lower) or (close[0] if close else None)
    return f"Did you mean {hint}?" if hint else f"The fields are {', '.join(known)}."


def _shown(value: Any) -> str:
    """The value as it is told to the client: short, and only what a person can make use of."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)) or value is None:
        return json_type(value)
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
