"""A file of any nano-GPT family in, one ``Checkpoint`` out. No code in a file is ever executed.

Names are resolved when they are first used: ``nanogpt.checkpoint.safe_pickle`` can be used without NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt.checkpoint.load import load_checkpoint
    from nanogpt.checkpoint.model_card import card, weights_sha256
    from nanogpt.checkpoint.types import Checkpoint, Tensor

_HOMES = {
    "Checkpoint": "types",
    "Tensor": "types",
    "card": "model_card",
    "load_checkpoint": "load",
    "weights_sha256": "model_card",
}

__all__ = ["Checkpoint", "Tensor", "card", "load_checkpoint", "weights_sha256"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
