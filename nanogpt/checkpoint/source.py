"""What a family's reader found in a file, before it is checked: facts, and tensors that are still in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from nanogpt.checkpoint.lazy import LazyTensor
from nanogpt.checkpoint.shown import shown
from nanogpt.checkpoint.types import Family
from nanogpt.errors import UnsupportedCheckpoint
from nanogpt.model.config import Activation


class Sizes(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int


@dataclass(frozen=True)
class Source:
    """``tensors`` have our names and layout. ``tied`` None: not declared, the tensors say. ``dataset`` is nanoGPT's.

    ``tokenizer`` is a spec that lies in the file itself, as our own training writes it.
    """

    family: Family
    tensors: Mapping[str, LazyTensor]
    sizes: Sizes
    bias: bool
    activation: Activation
    n_inner: int = 0
    layer_norm_eps: float = 1e-5
    tied: bool | None = None
    step: int | None = None
    recorded_loss: float | None = None
    chat_template: str | None = None
    dataset: str | None = None
    tokenizer: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())

    def noting(self, *notes: str) -> Source:
        return replace(self, notes=(*self.notes, *notes))


def read_sizes(config: Mapping[str, Any], where: str, *, block_size: str = "block_size") -> Sizes:
    """The sizes in a configuration; ``block_size`` is what it calls the context's length.

    Raises: UnsupportedCheckpoint listing the ones that are missing or no integers.
    """
    names = [block_size if name == "block_size" else name for name in Sizes._fields]
    wrong = [name for name in names if type(config.get(name)) is not int]
    if wrong:
        raise UnsupportedCheckpoint(
            f"{where} does not say {', '.join(wrong)}; it has"
            f" {', '.join(sorted(shown(key, 40) for key in config)[:12]) or 'nothing'}.",
            remedy="Only GPT-2's architecture is served.",
        )
    return Sizes(*(config[name] for name in names))


def number(value: Any) -> float | None:
    """A recorded loss: a number of Python's or NumPy's, or a tensor of one element."""
    if isinstance(value, LazyTensor):
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 1e30:
        return float(value)
    return None


def step_number(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None
