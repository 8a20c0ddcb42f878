"""Serve, from Python or over HTTP, a GPT that you trained yourself.

>>> from nanogpt import LLM, SamplingParams
>>> llm = LLM("log/model_40000.pt")
>>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=50))[0].text

Importing this package loads neither PyTorch nor NumPy; names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nanogpt._version import __version__

if TYPE_CHECKING:
    from nanogpt.errors import NanoGPTError
    from nanogpt.llm import LLM, Completion, batch_generate, load_model_from_checkpoint
    from nanogpt.sampling_params import SamplingParams

_HOMES = {
    "LLM": "nanogpt.llm",
    "Completion": "nanogpt.llm",
    "batch_generate": "nanogpt.llm",
    "load_model_from_checkpoint": "nanogpt.llm",
    "SamplingParams": "nanogpt.sampling_params",
    "NanoGPTError": "nanogpt.errors",
}

__all__ = [
    "LLM",
    "Completion",
    "NanoGPTError",
    "SamplingParams",
    "__version__",
    "batch_generate",
    "load_model_from_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
