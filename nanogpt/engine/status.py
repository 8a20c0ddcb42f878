"""How the engine is, as an HTTP worker knows it, and what a request is told while it is not ready. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanogpt.engine.messages import EngineState
from nanogpt.errors import EngineDraining, EngineLoading, EngineUnhealthy, ServiceUnavailable


@dataclass(frozen=True)
class EngineStatus:
    """How the engine is, as far as this process knows. ``card`` and the like are None until it was ready once."""

    state: EngineState = "loading"
    reason: str = ""
    restarts: int = 0
    engine_pid: int | None = None
    link: int | None = None
    """Which engine this is, for ``EngineClient.submit``: no two of a process's life have the same number."""
    model: str | None = None
    device: str | None = None
    precision: str | None = None
    runner: str | None = None
    block_size: int | None = None
    card: dict[str, Any] | None = None
    digest: str | None = None
    """SHA-256 of the weights: the same for the same weights in whatever file."""
    tokenizer: dict[str, Any] | None = None
    """``tokenizer_from_spec`` makes the tokenizer of it."""
    stats: dict[str, Any] = field(default_factory=dict)
    """The engine's counters (``EngineStats.to_wire``), at most a quarter of a second old; empty without an engine."""

    @property
    def num_running(self) -> int:
        return int(self.stats.get("num_running", 0))

    @property
    def num_waiting(self) -> int:
        return int(self.stats.get("num_waiting", 0))


def refusal(status: EngineStatus) -> ServiceUnavailable:
    """The error for a request that came while the engine was not ready."""
    if status.state == "draining":
        return EngineDraining("The server is shutting down.", remedy="Send the request again.")
    if status.state == "unhealthy":
        return EngineUnhealthy(f"The engine is not running: {status.reason}", retry_after_s=5.0)
    return EngineLoading("The model is still loading.", retry_after_s=2.0, remedy="Send the request again.")
