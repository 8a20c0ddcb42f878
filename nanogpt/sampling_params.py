"""How a sequence is sampled, and what is told of it. Shared by the Python API, HTTP schemas, the wire and samplers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nanogpt.errors import InvalidRequest


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. The order in which they act is that of this list.

    max_tokens: new tokens at most. logit_bias: added to the logits, ``{token id: bias}``.
    repetition_penalty: > 1 divides positive and multiplies negative logits of ids seen in prompt or output.
    presence_penalty, frequency_penalty: subtracted once, and per occurrence, for ids in the output (OpenAI).
    temperature: 0 is greedy (the largest logit, the lowest id among equals). top_k: exactly k candidates,
    ties broken by the lower id; 0 is off. top_p: the smallest set whose probability reaches p. min_p: drops
    ids less probable than min_p times the most probable one. seed: None draws a fresh one.
    stop: texts that end the output (they are not part of it). stop_token_ids: ids that end it.
    ignore_eos: go on after the end-of-text id. logprobs: how many alternatives a token is reported with (None:
    no log probabilities). prompt_logprobs: the same for the prompt's tokens. grammar: what the output follows, as
    ``nanogpt.grammars`` writes it; of the ids, after bias and penalties, only those are candidates that it allows.
    """

    max_tokens: int = 100
    logit_bias: Mapping[int, float] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float, *, integer: bool = False) -> None:
            value: Any = getattr(self, name)
            kinds: Any = int if integer else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
                what = "an integer" if integer else "a finite number"
                raise InvalidRequest(f"{name} must be {what}, not {value!r}.", field=name)
            if not low <= value <= high:
                raise InvalidRequest(f"{name} must be between {low:g} and {high:g}, not {value!r}.", field=name)

        check("max_tokens", 1, 2**31 - 1, integer=True)
        check("repetition_penalty", 0.01, 100.0)
        check("presence_penalty", -100.0, 100.0)
        check("frequency_penalty", -100.0, 100.0)
        check("temperature", 0.0, 100.0)
        check("top_k", 0, 2**31 - 1, integer=True)
        check("top_p", 0.0, 1.0)
        check("min_p", 0.0, 1.0)
        for name in ("seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check(name, -(2**63) if name == "seed" else 0, 2**64 - 1 if name == "seed" else 100, integer=True)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(text, str) and text for text in self.stop) or len(self.stop) > 16:
            raise InvalidRequest("stop must be a text or a list of at most 16 texts, none of them empty.", field="stop")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not all(type(token_id) is int for token_id in self.stop_token_ids):
            raise InvalidRequest("stop_token_ids must be a list of integers.", field="stop_token_ids")
        if self.grammar is not None and (not isinstance(self.grammar, str) or not self.grammar):
            raise InvalidRequest("grammar must be a text that nanogpt.grammars has made, or None.", field="grammar")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def to_wire(self) -> dict[str, Any]:
        """Only what differs from the defaults: short on the wire, and stable as a cache key."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}

    @classmethod
    def from_wire(cls, values: Mapping[str, Any]) -> SamplingParams:
        return cls(**values)


@dataclass(slots=True)
class TokenLogprobs:
    """Natural-log probabilities under the model's own distribution (before temperature and penalties).

    ``rank`` is 1 for the most probable token. ``top`` lists as many (id, logprob) as were asked for, best first.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]
