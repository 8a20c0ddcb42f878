"""A JSON object to one of our models, and the words in which its fields are refused. Shared by every route's schema.

pydantic finds the fault; what is said of it is ours: the field, the value, the limit, the remedy. Knows no route.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanogpt.errors import InvalidRequest
from nanogpt.sampling_params import SamplingParams
from nanogpt.web.body import json_type

Text = Annotated[str, Field(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
MAX_BIASES = 1024
Biases = Annotated[
    dict[str, Bias],
    Field(max_length=MAX_BIASES, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,10}$"}}),
]

Model = TypeVar("Model", bound="Fields")


class Fields(BaseModel):
    """What all models of requests share: no conversions, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    at_most: ClassVar[Mapping[str, int]] = {"logit_bias": MAX_BIASES}
    """Most entries of a field, looked at before each of a million entries is found fault with."""


def read_fields(model: type[Model], fields: Mapping[str, Any], elsewhere: Mapping[str, str] | None = None) -> Model:
    """The object as the model. ``elsewhere`` names fields as other servers call them, and ours.

    Raises: InvalidRequest; for a wrong value rather than for an unknown name, where there are both.
    """
    for name, limit in model.at_most.items():
        given = fields.get(name)
        if isinstance(given, (list, dict)) and len(given) > limit:
            raise InvalidRequest(f"{name} must have at most {limit} entries, not {len(given)}.", field=name)
    known = model.model_fields
    try:
        value = model.model_validate({name: value for name, value in fields.items() if name in known})
    except ValidationError as error:
        raise _refusal(error, model) from None
    for name in fields:
        if name not in known:
            raise InvalidRequest(
                f"Unknown field {shown(name)}.", field=name[:80], remedy=nearest_field(name, known, elsewhere)
            )
    return value


def token_biases(bias: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are texts; ids are not. Raises: InvalidRequest for a key that is not a token id."""
    ids = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(
                f"logit_bias has the key {shown(key)}; its keys must be token ids.", field="logit_bias"
            )
        ids[int(key)] = value
    return ids


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def nearest_field(name: str, known: Mapping[str, Any], elsewhere: Mapping[str, str] | None = None) -> str:
    lower = name[:80].lower()
    close = difflib.get_close_matches(lower, known, n=1)
    hint = (elsewhere or {}).get(lower) or (close[0] if close else None)
    return f"Did you mean {hint}?" if hint else f"The fields are {', '.join(known)}."


def shown(value: Any) -> str:
    """The value as it is told to the client: short, and only what a person can make use of."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)) or value is None:
        return json_type(value)
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def _refusal(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first thing that pydantic found fault with, in our words."""
    details = error.errors(include_url=False)
    field = str(details[0]["loc"][0])
    # A union's members are each found at fault; a length tells more than "not a text".
    of_field = [d for d in details if d["loc"][0] == field]
    detail = next((d for d in of_field if d["type"] not in ("string_type", "list_type", "none_required")), of_field[-1])
    context, value = detail.get("ctx", {}), detail["input"]
    name = _name(detail["loc"], field)
    if detail["type"] == "missing":
        return InvalidRequest(f"{name} is required.", field=field)
    if detail["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown field {name}.", field=field)
    if detail["type"] == "too_short":
        return InvalidRequest(f"{name} must not be empty.", field=field)
    if detail["type"] == "union_tag_not_found":
        return InvalidRequest(f"{name}.type is required.", field=field)
    if detail["type"] == "union_tag_invalid":
        said = f"{name}.type must be one of {context['expected_tags']}, not {shown(context['tag'])}."
        return InvalidRequest(said, field=field)
    if detail["type"] == "value_error":  # a rule of ours, which says it all
        return InvalidRequest(f"{name} {context['error']}.", field=field)
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
        "list_type": "a list",
        "literal_error": context.get("expected", "").replace("False", "false"),
        "model_attributes_type": "an object",
        "dict_type": "an object of token ids and numbers" if field == "logit_bias" else "an object",
        "model_type": "an object",
        "greater_than_equal": "",
        "less_than_equal": "",
    }.get(detail["type"])
    if field == "stop" and detail["type"] in ("string_type", "list_type"):
        expected = "a text or a list of texts"
    if not expected:
        expected = _limits(field, model, context)
    return InvalidRequest(f"{name} must be {expected}, not {shown(value)}.", field=field)


def _name(path: tuple[int | str, ...], field: str) -> str:
    """``messages[0].role``, ``logit_bias of '5'``. Which member of a union (stop, response_format) is not told."""
    if field == "stop":
        return field
    if field == "response_format":
        path = (field, *path[2:])
    if field == "logit_bias":
        return field if len(path) == 1 else f"{field} of {shown(str(path[1]))}"
    parts = [f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in path[1:]]
    return field + "".join(part for part in parts if part.isascii() and "(" not in part and "-" not in part)


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


_AS_THEY_ARE = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "min_p", "seed",
)  # fmt: skip


def sampling_params(body: Any, *, more_stops: tuple[str, ...] = (), **more: Any) -> SamplingParams:
    """Those of a body whose fields have our names, as every generating route's have; ``more`` is what differs."""
    return SamplingParams(
        logit_bias=token_biases(body.logit_bias) if body.logit_bias else None,
        stop=(*stop_texts(body.stop), *more_stops),
        **{name: getattr(body, name) for name in _AS_THEY_ARE},
        **more,
    )
