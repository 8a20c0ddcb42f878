"""What goes between an engine and whoever asks it: one request type, two events. Plain data, no behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanogpt.sampling_params import SamplingParams, TokenLogprobs

TIMEOUT = "timeout"
"""``Finished.error`` of a request that its own deadline ended (reason ``abort``): it ends with what it has."""

GRAMMAR = "grammar: "
"""How ``Finished.error`` begins when a request's grammar, not the engine, is at fault (reason ``error``)."""

FinishReason = Literal["stop", "length", "abort", "error"]
EngineState = Literal["loading", "ready", "draining", "unhealthy"]


@dataclass(slots=True)
class GenerateRequest:
    """One sequence to generate. ``timeout_s`` bounds its whole life.

    ``client`` names who asks: places and the queue are shared fairly among clients. ``max_concurrency`` is how many
    sequences this client may have in the engine at once; 0: any number.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    request_id: str = ""
    client: str = ""
    timeout_s: float = 300.0
    max_concurrency: int = 0


@dataclass(slots=True)
class Tokens:
    """Tokens of one step, with their log probabilities where they were asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True)
class Timings:
    """Seconds, measured in the engine from the moment of admission."""

    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0


@dataclass(slots=True)
class Finished:
    """The one final event of every accepted request."""

    reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    timings: Timings = field(default_factory=Timings)
    error: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
