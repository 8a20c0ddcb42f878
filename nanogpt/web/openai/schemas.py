"""What a client may ask by OpenAI's API: fields, types and limits, and what is refused by name.

The models are the single source for validation and for ``/openapi.json``. A null means that the field is not given, as
it does at OpenAI's. Knows nothing of HTTP or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from nanogpt.errors import InvalidRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.web.fields import MAX_BIASES, Biases, Fields, Text, read_fields, sampling_params
from nanogpt.web.openai.unsupported import ELSEWHERE, NOT_IN_MESSAGES, UNSUPPORTED
from nanogpt.web.schemas import MAX_LOGPROBS

MAX_CHOICES = 128
MAX_MESSAGES = 1024
MAX_STOPS = 8
MAX_PATTERN_CHARS = 4000

Prompt = str | list[int]


def _all_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _read_prompts(value: Any) -> list[Prompt]:
    """One prompt or many, each a text or token ids, as a list of many."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if not value:
            raise ValueError("must not be an empty list")
        if _all_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(item and _all_ids(item) for item in value):
            return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")


def _read_content(value: Any) -> str:
    """A message's text: one, or parts of it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"has a part {i} of the type {kind[:40]!r}; this model reads text alone")
        if kind is None or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f'has a part {i} that is not {{"type": "text", "text": …}}')
        texts.append(part["text"])
    return "".join(texts)


def _read_ids(value: Any) -> list[int]:
    if not _all_ids(value):
        raise ValueError("must be a list of token ids")
    ids: list[int] = value
    return ids


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[
    list[Prompt],
    PlainValidator(_read_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
TokenIds = Annotated[
    list[int],
    PlainValidator(_read_ids),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}}),
]
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    PlainValidator(_read_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]


def nullable(schema: dict[str, Any]) -> None:
    """Optional fields may be null."""
    for name, value in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in value.get("anyOf", ()):
            told = {key: value.pop(key) for key in ("title", "description", "default") if key in value}
            schema["properties"][name] = {"anyOf": [value, {"type": "null"}], **told}


class StreamOptions(Fields):
    include_usage: bool = Field(False, description="Send the usage in a last chunk of its own.")
    continuous_usage_stats: bool = Field(
        False, description="With include_usage: every chunk tells the usage so far. Ours and vLLM's, not OpenAI's."
    )
    include_obfuscation: Literal[False] = Field(False, description="Nothing is obfuscated.")


class TextFormat(Fields):
    type: Literal["text"]


class JsonObjectFormat(Fields):
    type: Literal["json_object"]


class JsonSchema(Fields):
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema that the answer follows.")
    name: str | None = Field(None, max_length=1000, description="Of no effect.")
    description: str | None = Field(None, max_length=10_000, description="Of no effect.")
    strict: bool | None = Field(None, description="Of no effect: an answer always follows the schema.")


class JsonSchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class SamplingBody(Fields):
    """What completions and chats have in common."""

    model_config = ConfigDict(json_schema_extra=nullable)

    at_most: ClassVar[Mapping[str, int]] = {
        "logit_bias": MAX_BIASES,
        "metadata": 16,
        "messages": MAX_MESSAGES,
        "stop": MAX_STOPS,
    }

    model: str = Field("default", max_length=1000, description="The name of a served model, or default.")
    temperature: float = Field(1.0, ge=0.0, le=2.0, description="Randomness; 0 always takes the most probable token.")
    top_p: float = Field(
        1.0, ge=0.0, le=1.0, description="Sample among the fewest tokens whose probabilities add up to p."
    )
    top_k: int = Field(
        0, ge=0, le=2**31 - 1, description="Sample among the k most probable tokens. 0: all. Ours, not OpenAI's."
    )
    min_p: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Drop tokens less probable than min_p times the most probable one. Ours, not OpenAI's.",
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices for each prompt.")
    seed: int | None = Field(
        None, ge=-(2**63), le=2**64 - 1, description="The same seed gives the same text; choice i has the seed + i."
    )
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Text or texts that end a choice; they are not part of it."
    )
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="Subtracted once for a token of the answer.")
    frequency_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="Subtracted for every time that a token is in the answer."
    )
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=100.0, description="Above 1: tokens seen before are less likely. Ours, not OpenAI's."
    )
    logit_bias: Biases | None = Field(None, description="Added to the logits: token id to bias.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    response_format: ResponseFormat | None = Field(
        None, description="text, json_object, or json_schema with a schema that the answer follows."
    )
    regex: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_PATTERN_CHARS,
        description="A regular expression that the whole answer follows. Ours, not OpenAI's.",
    )
    ignore_eos: bool = Field(
        False, description="Go on after the end-of-text token, for load tests. Ours and vLLM's, not OpenAI's."
    )
    cache: bool = Field(True, description="Whether an identical answer that is there already may be used. Ours.")
    user: str | None = Field(None, max_length=1000, description="Of no effect.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Of no effect.")
    prompt_cache_key: str | None = Field(None, max_length=1000, description="Of no effect: prefixes are always reused.")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(None, description="Of no effect.")
    store: Literal[False] = Field(False, description="Answers are never stored.")
    service_tier: Literal["auto", "default"] = Field("auto", description="Of no effect.")

    def _check(self) -> None:
        """What one field alone does not show. Raises: InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options is for streams.", field="stream_options", remedy='Send "stream": true, or leave it out.'
            )
        if self.regex is not None and self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequest("Give regex or response_format, not both.", field="regex")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def grammar_field(self) -> str:
        """Where the grammar comes from, if there is one."""
        return "response_format" if self.regex is None else "regex"

    def grammar(self) -> str | None:
        """What the answer has to follow, as the engine reads it. Raises: InvalidRequest."""
        wanted = self.response_format
        if self.regex is None and (wanted is None or isinstance(wanted, TextFormat)):
            return None
        from nanogpt import grammars  # only those who ask for a form pay for it

        grammar: str
        if self.regex is not None:
            grammar = grammars.from_regex(self.regex, field="regex")
        elif isinstance(wanted, JsonSchemaFormat):
            grammar = grammars.from_json_schema(wanted.json_schema.schema_)
        else:
            grammar = grammars.any_json_object()
        return grammar

    def sampling_params(self, max_tokens: int, *, more_stops: tuple[str, ...] = (), **more: Any) -> SamplingParams:
        more |= {"grammar": self.grammar(), "ignore_eos": self.ignore_eos}
        return sampling_params(self, max_tokens=max_tokens, more_stops=more_stops, **more)


class CompletionBody(SamplingBody):
    """The body of POST /v1/completions."""

    prompt: Prompts = Field(description="Text, token ids, or a list of either: all are computed together.")
    max_tokens: int = Field(16, ge=0, description="New tokens at most. 0 with echo: the prompt's log probabilities.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="Generate so many for each prompt, and answer with the n of the highest mean log probability.",
    )
    echo: bool = Field(False, description="Begin each choice with its prompt.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Report each token with its log probability, and with so many of the most probable ones.",
    )

    @classmethod
    def parse(cls, fields: Mapping[str, Any], settings: Settings) -> CompletionBody:
        """The body as asked, within this server's limits. Raises: InvalidRequest."""
        body = read_fields(cls, given_fields(fields, cls), ELSEWHERE)
        body._check()
        check_max_tokens("max_tokens", body.max_tokens, settings)
        if body.best_of is not None and body.best_of < body.n:
            raise InvalidRequest(f"best_of must be at least n, which is {body.n}, not {body.best_of}.", field="best_of")
        if body.stream and body.candidates > body.n:
            raise InvalidRequest("The best of several choices cannot be streamed.", field="best_of")
        if body.stream and body.echo and body.logprobs is not None:
            raise InvalidRequest(
                "echo with logprobs cannot be streamed.",
                field="echo",
                remedy="Leave out one of stream, echo, logprobs.",
            )
        return body

    @property
    def candidates(self) -> int:
        """Texts that are generated for each prompt."""
        return self.n if self.best_of is None else self.best_of


class Message(Fields):
    model_config = ConfigDict(json_schema_extra=nullable)

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer is the same as system.")
    content: Content = Field(description="A text, or a list of text parts.")


class ChatBody(SamplingBody):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation, oldest message first."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="New tokens at most; without it, what the context and the server admit."
    )
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool = Field(False, description="Report each token with its log probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="With logprobs: so many of the most probable tokens."
    )
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(None, description="Of no effect.")

    @classmethod
    def parse(cls, fields: Mapping[str, Any], settings: Settings) -> ChatBody:
        """The body as asked, within this server's limits. Raises: InvalidRequest."""
        body = read_fields(cls, given_messages(given_fields(fields, cls)), ELSEWHERE)
        body._check()
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise InvalidRequest(
                "max_tokens and max_completion_tokens mean the same; give one of them.", field="max_tokens"
            )
        for name in ("max_tokens", "max_completion_tokens"):
            check_max_tokens(name, getattr(body, name) or 0, settings)
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest(
                "top_logprobs needs logprobs.", field="top_logprobs", remedy='Send "logprobs": true as well.'
            )
        return body

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def check_max_tokens(name: str, value: int, settings: Settings) -> None:
    if value > settings.max_new_tokens:
        raise InvalidRequest(
            f"{name} must be at most {settings.max_new_tokens} on this server, not {value}.",
            field=name,
            remedy="Ask for less, or raise NANOGPT_MAX_NEW_TOKENS.",
        )


def given_fields(fields: Mapping[str, Any], model: type[Fields]) -> dict[str, Any]:
    """The fields that are not null. Raises: InvalidRequest for one that OpenAI knows and this server does not."""
    for name, value in fields.items():
        if name in UNSUPPORTED and name not in model.model_fields and value is not None:
            raise InvalidRequest(f"{name} is not supported.", field=name, remedy=UNSUPPORTED[name])
    return {
        name: value
        for name, value in fields.items()
        if value is not None or not (name in UNSUPPORTED or name in model.model_fields)
    }


def given_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """The same, without what an answer's message has of null when a client sends it back. Raises: InvalidRequest."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
        return fields
    return {**fields, "messages": [_given_message(i, message) for i, message in enumerate(messages)]}


def _given_message(index: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    for name, remedy in NOT_IN_MESSAGES.items():
        if message.get(name) is not None:
            raise InvalidRequest(f"messages[{index}].{name} is not supported.", field="messages", remedy=remedy)
    return {name: value for name, value in message.items() if name not in NOT_IN_MESSAGES}
