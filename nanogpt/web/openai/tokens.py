"""The tokenizer over HTTP, in the form that vLLM has and lm-eval's remote tokenizer asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from nanogpt.errors import InvalidRequest
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.web.engine import ServedModel
from nanogpt.web.fields import Fields, read_fields
from nanogpt.web.openai.chat import prompt_token_ids
from nanogpt.web.openai.job import check_ids
from nanogpt.web.openai.schemas import MAX_MESSAGES, Message, TokenIds, given_fields, given_messages, nullable
from nanogpt.web.token_logprobs import token_text


class TokenizeBody(Fields):
    """The body of POST /tokenize: a prompt or messages."""

    model_config = ConfigDict(json_schema_extra=nullable)

    model: str = Field("default", max_length=1000, description="The name of a served model, or default.")
    prompt: str | None = Field(None, description="The text to tokenize.")
    messages: list[Message] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, description="A conversation, as /v1/chat/completions reads it."
    )
    allow_special: bool = Field(
        True,
        description="Whether <|endoftext|> in the prompt is that token, or the text that /v1/completions takes it for.",
    )
    add_special_tokens: bool = Field(True, description="Of no effect: these tokenizers add none.")
    add_generation_prompt: Literal[True] = Field(True, description="Messages end where the next answer begins.")
    return_token_strs: bool = Field(False, description="Answer with the tokens' texts as well.")

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> TokenizeBody:
        """Raises: InvalidRequest."""
        body = read_fields(cls, given_messages(given_fields(fields, cls)))
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("Send a prompt or messages, one of them.", field="prompt")
        return body


class DetokenizeBody(Fields):
    """The body of POST /detokenize."""

    model_config = ConfigDict(json_schema_extra=nullable)

    model: str = Field("default", max_length=1000, description="The name of a served model, or default.")
    tokens: TokenIds = Field(description="Token ids.")

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> DetokenizeBody:
        """Raises: InvalidRequest."""
        return read_fields(cls, given_fields(fields, cls))


def tokenize(body: TokenizeBody, model: ServedModel) -> dict[str, Any]:
    if body.messages is not None:
        token_ids = prompt_token_ids(model, body.messages)
    else:
        token_ids = model.tokenizer.encode(body.prompt or "", allow_special=body.allow_special)
    answer: dict[str, Any] = {
        "tokens": token_ids,
        "count": len(token_ids),
        "max_model_len": model.card.get("block_size"),
    }
    if body.return_token_strs:
        answer["token_strs"] = [token_text(model.tokenizer, token_id) for token_id in token_ids]
    return answer


def detokenize(body: DetokenizeBody, model: ServedModel) -> dict[str, Any]:
    check_ids(model.tokenizer, body.tokens, "tokens")
    return {"prompt": model.tokenizer.decode(body.tokens)}


def tokenizer_info(model: ServedModel) -> dict[str, Any]:
    """``eos_token`` and the like are null for a character model, which has none."""
    tokenizer: Tokenizer = model.tokenizer
    eos = None if tokenizer.eos_token_id is None else tokenizer.decode([tokenizer.eos_token_id])
    return {
        "model": model.name,
        "tokenizer_class": tokenizer.name,
        "vocab_size": tokenizer.num_tokens,
        "max_model_len": model.card.get("block_size"),
        "eos_token": eos,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token": eos,
        "pad_token": eos,
        "chat_template": model.card.get("chat_template"),
    }
