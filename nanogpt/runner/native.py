"""The CPU runner: C++ (``nanogpt/kernels``) behind the runner's protocol. In the engine's thread; imports no torch.

The weights are packed once (int8, int4 or float32) and the arithmetic is such that a row's logits have the same bits in
any company: alone or in a batch, in chunks or whole, with any number of threads and on any instruction set. See
``docs/cpu-performance.md``. What this module does: turn a checkpoint into a packed buffer, choose threads and
instruction set, and pass batches on.
"""

from __future__ import annotations

import os
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from nanogpt import _kernels
from nanogpt.checkpoint.mapped import release_pages
from nanogpt.checkpoint.types import Checkpoint
from nanogpt.errors import SettingsError
from nanogpt.model.config import GPTConfig
from nanogpt.runner.base import Batch, Float32, Int32, StepOutput
from nanogpt.runner.cpus import usable_cpus
from nanogpt.runner.memory import give_back_memory
from nanogpt.runner.native_cache import Bytes, packed_in_memory, packed_weights
from nanogpt.runner.sampler import token_logprobs

_KINDS = {"fp32": 0, "int8": 1, "int4": 2}
_HEAD_ROWS = 64
"""Rows whose logits are held at once where a whole text's are asked for (a row of GPT-2's is 200 kB)."""


class NativeRunner:
    """See ``nanogpt.runner.base.Runner``. ``precision``: int8 (default), int4, or fp32 (exact to float32's rounding).

    ``threads`` 0: as many as the container may use. The variable NANOGPT_ISA forces an instruction set. Under
    int4 the matrices that ``int8_matrices`` names are in int8. ``cached`` False keeps no packed weights; for measuring.
    """

    device = "cpu"
    name = "native"
    same_bits = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        precision: str = "int8",
        num_slots: int = 32,
        threads: int = 0,
        int8_matrices: Collection[str] = (),
        cached: bool = True,
    ) -> None:
        if precision == "auto":
            precision = "int8"
        if precision not in _KINDS:
            raise SettingsError(
                f"precision is {precision!r}; the CPU runner computes in {', '.join(_KINDS)}.",
                remedy="Choose one of these, or --runner torch.",
                field="precision",
            )
        self.config = checkpoint.config
        self.num_slots = num_slots
        self.precision = precision
        self.num_threads = threads or usable_cpus()
        config = _native_config(self.config)
        isa = chosen_isa()
        self.arithmetic = precision
        self.int8_matrices: list[str] | None = None
        if precision == "int4":
            kinds = _mixture(self.config, int8_matrices)
            self.int8_matrices = [name for name in matrix_names(self.config) if name in int8_matrices]
            if self.int8_matrices:
                self.arithmetic += f" with {len(self.int8_matrices)} of {len(kinds)} matrices in int8"
        else:
            kinds = [_KINDS[precision]] * _kernels.num_matrices(config)
        self.packed_bytes = _kernels.packed_bytes(config, kinds)

        def pack(memory: Bytes) -> None:
            pack_into(memory, checkpoint, config, kinds, self.num_threads)

        packed = (
            packed_weights(checkpoint, f"{self.config} {kinds}", self.packed_bytes, pack)
            if cached
            else packed_in_memory(self.packed_bytes, pack)
        )
        give_back_memory()
        self._model: _kernels.Model | None = _kernels.Model(config, kinds, packed, num_slots, self.num_threads, isa)

    @property
    def isa(self) -> str:
        """The instruction set that was chosen."""
        return str(self._running().isa)

    def step(self, batch: Batch) -> StepOutput:
        """Compute the batch's tokens, write their K and V, sample."""
        model = self._running()
        tokens, kept = model.step(
            batch.slots, batch.starts, batch.num_tokens, batch.token_ids, batch.sampling, batch.num_drafts
        )
        output = StepOutput(tokens)
        if any(state is not None and state.params.logprobs is not None for state in batch.sampling):
            self._add_logprobs(batch, output, kept)
        for b, asked in (batch.prompt_logprobs or {}).items():
            first = int(batch.num_tokens[:b].sum())
            output.prompt_logprobs[b] = []
            for i in range(0, len(asked.following), _HEAD_ROWS):
                following = asked.following[i : i + _HEAD_ROWS]
                part = self._head(np.arange(first + i, first + i + len(following), dtype=np.int32))
                output.prompt_logprobs[b] += token_logprobs(part, following, asked.num_top, self.config.num_tokens)
        return output

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy K and V of the first positions of one slot to another."""
        self._running().copy_prefix(source, target, num_tokens)

    def logits(self, token_ids: Int32) -> Float32:
        """Logits of every position of one text, outside all slots. Shapes: ``[T]`` → ``[T, V]``."""
        model = self._running()
        token_ids = np.ascontiguousarray(token_ids, np.int32)
        result = np.empty((len(token_ids), self.config.vocab_size), np.float32)
        one = np.zeros(1, np.int32)
        model.step(one + model.spare_slot, one, one + len(token_ids), token_ids, [None], None)
        for i in range(0, len(token_ids), _HEAD_ROWS):
            result[i : i + _HEAD_ROWS] = self._head(np.arange(i, min(i + _HEAD_ROWS, len(token_ids)), dtype=np.int32))
        return result

    def time_parts(self) -> None:
        """From now on count the time of each part of the steps, from zero."""
        self._running().time_parts()

    def part_ns(self) -> dict[str, int]:
        """Nanoseconds of each part of all steps since ``time_parts``."""
        return dict(self._running().part_ns())

    def close(self) -> None:
        """Give back memory and threads; the runner is not used again."""
        self._model = None

    def _running(self) -> _kernels.Model:
        if self._model is None:
            raise RuntimeError("the runner was closed")
        return self._model

    def _add_logprobs(self, batch: Batch, output: StepOutput, kept: list[tuple[int, int]]) -> None:
        logits = self._running().logits()[:, : self.config.vocab_size]
        for b, row in kept:
            state = batch.sampling[b]
            if state is not None and state.params.logprobs is not None:
                entries = output.logprobs.setdefault(b, [])
                token_id = output.token_ids[b][len(entries)]
                num_tokens = self.config.num_tokens
                entries += token_logprobs(logits[row : row + 1], [token_id], state.params.logprobs, num_tokens)

    def _head(self, rows: Int32) -> Float32:
        logits: Float32 = self._running().head(rows)
        return logits[:, : self.config.vocab_size]


def chosen_isa() -> str:
    """The best instruction set that this machine runs, or the one that NANOGPT_ISA names.

    Raises: SettingsError where that one is not in this build or not in this machine.
    """
    usable = _kernels.usable_isas()
    forced = os.environ.get("NANOGPT_ISA", "")
    if forced and forced not in usable:
        raise SettingsError(
            f"NANOGPT_ISA is {forced!r}; this build on this machine runs {', '.join(usable)}.",
            remedy="Leave it unset to take the first of these.",
            field="NANOGPT_ISA",
        )
    return forced or str(usable[0])


def pack_into(
    packed: npt.NDArray[np.uint8], checkpoint: Checkpoint, config: _kernels.Config, kinds: list[int], threads: int
) -> None:
    """Quantize every tensor of the checkpoint into its place in the packed buffer, one after the other."""
    tensors = checkpoint.tensors

    def values(name: str) -> Float32 | None:
        return tensors[name].float32() if name in tensors else None

    for name, is_matrix, num_rows, width in _kernels.entries(config, kinds):
        if is_matrix:
            stored = f"{name}.weight"
            weight = tensors[stored].float32()
            _kernels.pack(config, kinds, packed, name, weight, values(f"{name}.bias"), threads)
        else:
            stored = name if name in tensors else f"{name}.weight"
            vector = values(stored)
            if vector is None:  # a norm without a bias
                vector = np.zeros(num_rows * width, np.float32)
            _kernels.pack(config, kinds, packed, name, vector, None, threads)
        if stored in tensors:
            release_pages(tensors[stored].raw)


def int4_bytes(config: GPTConfig, int8_matrices: Collection[str]) -> int:
    """Size of the packed weights under int4 with these matrices in int8."""
    return int(_kernels.packed_bytes(_native_config(config), _mixture(config, int8_matrices)))


def _mixture(config: GPTConfig, int8_matrices: Collection[str]) -> list[int]:
    return [_KINDS["int8" if name in int8_matrices else "int4"] for name in matrix_names(config)]


def matrix_names(config: GPTConfig) -> list[str]:
    """The packed matrices' names, in their order."""
    native = _native_config(config)
    kinds = [1] * _kernels.num_matrices(native)
    return [name for name, is_matrix, _, _ in _kernels.entries(native, kinds) if is_matrix]


def _native_config(config: GPTConfig) -> _kernels.Config:
    native = _kernels.Config()
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "num_tokens", "n_inner", "bias", "tied"):
        setattr(native, name, getattr(config, name))
    native.erf = config.activation == "gelu_erf"
    native.eps = config.layer_norm_eps
    return native
