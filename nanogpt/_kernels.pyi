"""Types of the compiled module (nanogpt/kernels/module.cc)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanogpt.runner.base import Float32, Int32, SamplingState

Bytes = npt.NDArray[np.uint8]

class Config:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    num_tokens: int
    n_inner: int
    bias: bool
    erf: bool
    tied: bool
    eps: float

class Model:
    def __init__(
        self, config: Config, kinds: Sequence[int], packed: Bytes, num_slots: int, threads: int, isa: str
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def spare_slot(self) -> int: ...
    def step(
        self,
        slots: Int32,
        starts: Int32,
        num_tokens: Int32,
        token_ids: Int32,
        sampling: Sequence[SamplingState | None],
        num_drafts: Int32 | None,
    ) -> tuple[list[list[int]], list[tuple[int, int]]]: ...
    def logits(self) -> Float32: ...
    def head(self, rows: Int32) -> Float32: ...
    def time_parts(self) -> None: ...
    def part_ns(self) -> dict[str, int]: ...
    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None: ...

def usable_isas() -> list[str]: ...
def num_matrices(config: Config) -> int: ...
def packed_bytes(config: Config, kinds: Sequence[int]) -> int: ...
def entries(config: Config, kinds: Sequence[int]) -> list[tuple[str, bool, int, int]]: ...
def checksum(data: Bytes) -> int: ...
def pack(
    config: Config,
    kinds: Sequence[int],
    packed: Bytes,
    name: str,
    weight: Float32,
    bias: Float32 | None,
    threads: int,
) -> None: ...
