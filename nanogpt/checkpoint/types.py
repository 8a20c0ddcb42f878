"""What a loaded checkpoint is: the config, the tensors as they lie in the file, the tokenizer, and the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nanogpt.model.config import GPTConfig
from nanogpt.tokenizer.base import Tokenizer

DType = Literal["float32", "float16", "bfloat16", "float64"]
Family = Literal["nanogpt", "build-nanogpt", "llm.c", "huggingface", "nano-gpt-api"]


@dataclass(frozen=True)
class Tensor:
    """One tensor, memory-mapped. ``raw`` is a read-only view on the file; bfloat16 is held as uint16.

    ``raw`` may be strided (a Hugging Face Conv1D weight is a transposed view), so nothing is copied until
    ``float32`` is called.
    """

    dtype: DType
    raw: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    @property
    def num_bytes(self) -> int:
        return self.raw.nbytes

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as C-contiguous float32; a view on the file where it already is that."""
        if self.dtype == "bfloat16":
            wide = np.ascontiguousarray(self.raw).astype(np.uint32)
            wide <<= np.uint32(16)
            return wide.view(np.float32)
        return np.ascontiguousarray(self.raw, dtype=np.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any family, in one form.

    ``tensors`` has exactly the names and shapes of ``config.tensor_shapes()``: prefixes stripped, Conv1D
    transposed, buffers dropped, padding rows of llm.c dropped. Nothing in it was guessed silently: what was
    detected rather than read is in ``notes``.
    """

    path: Path
    family: Family
    config: GPTConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    step: int | None = None
    recorded_loss: float | None = None
    chat_template: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """What the API calls this model, for example ``model_40000``."""
        if self.path.is_dir() or self.path.name in ("ckpt.pt", "model.safetensors", "pytorch_model.bin"):
            return (self.path if self.path.is_dir() else self.path.resolve().parent).name or self.path.stem
        return self.path.stem
