"""A tensor's place in a file, whatever the file: its shape is known, its bytes are not touched until it is opened."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from nanogpt.checkpoint.types import DType, Tensor

NUMPY_DTYPE: Final[dict[DType, str]] = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


class Span(NamedTuple):
    """Which elements of which storage a tensor lies on."""

    storage: Hashable
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """``open`` gives the view on the file and takes the tensor's name, for messages.

    ``is_floating`` is False for what cannot be a weight. ``verify`` compares the bytes with a checksum in the file,
    where it holds one.
    """

    shape: tuple[int, ...]
    span: Span
    open: Callable[[str], Tensor]
    is_floating: bool = True
    verify: Callable[[str], None] = lambda name: None

    def transposed(self) -> LazyTensor:
        """The same bytes as their transpose."""

        def view(name: str) -> Tensor:
            tensor = self.open(name)
            return Tensor(tensor.dtype, np.transpose(tensor.raw))

        return LazyTensor(self.shape[::-1], self.span, view, self.is_floating, self.verify)

    def rows(self, count: int) -> LazyTensor:
        """The first rows only."""

        def view(name: str) -> Tensor:
            tensor = self.open(name)
            return Tensor(tensor.dtype, tensor.raw[:count])

        return LazyTensor((count, *self.shape[1:]), self.span, view, self.is_floating, self.verify)

    def item(self) -> float | None:
        """The value of a tensor of one element (a recorded loss); None where it is not one."""
        if not self.is_floating or any(size != 1 for size in self.shape):
            return None
        return float(self.open("a number").float32().reshape(-1)[0])
