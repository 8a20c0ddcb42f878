"""A step on a CUDA device, all its kernels launched as one.

A step is over a hundred small kernels, and launching them one by one from Python takes ten times as long as they
compute. So they are recorded when the runner is made, as CUDA graphs, and played. A graph's shapes are fixed: there is
one for 1, 2, 4, 8, 16 .. tokens, and rows that no sequence needs compute a token in a slot that is nobody's.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from nanogpt.checkpoint.digest import cache_folder
from nanogpt.model.gpt import GPT, LayerNorm
from nanogpt.runner.base import Int32

logger = logging.getLogger("nanogpt.runner")

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Tokens of a step that are recorded. Each of them reads K and V for itself, which longer chunks outgrow."""
_MOST_COPIED = 32
"""The largest step without Triton, where each token has a copy of its sequence's K and V."""
_WARM_UPS = 2
"""Runs before a recording: libraries choose and load their kernels, which cannot be recorded."""


class StepGraphs:
    """``kv`` ``[L, 2, slots, H, T, D]``: the last slot is the one that is nobody's. Used by one thread at a time.

    Everything is recorded at once, so that no memory has to be found later; it takes some seconds. Steps of more than
    ``most_tokens`` are not for it.
    """

    def __init__(self, model: GPT, kv: torch.Tensor) -> None:
        self._model = model
        self._kv = kv
        self._spare = kv.shape[2] - 1
        on_device = kv.device.type == "cuda"
        self._kernels = triton_kernels() if on_device else None
        self.most_tokens = _MOST_COPIED if on_device and not self._kernels else max(_SIZES)
        # Token ids, slots, first positions, positions: one transfer a step, from memory that the device reads itself.
        self._host = torch.zeros(4, self.most_tokens, dtype=torch.int64, pin_memory=on_device)
        self._host[1] = self._spare
        self._inputs = self._host.to(kv.device)
        self._copied = torch.cuda.Event() if on_device else None
        self._graphs = self._record() if on_device else []

    def step(self, ids: Int32, slots: Int32, starts: Int32, counts: Int32) -> torch.Tensor:
        """Write K and V; the hidden states that the head takes, valid until the next step.

        Shapes: ids ``[N]``, the others ``[B]`` → ``[N, C]``.
        """
        n = len(ids)
        if self._copied is not None:
            self._copied.synchronize()  # a step that samples nothing was not waited for
        table = self._host.numpy()
        table[:, :n] = token_table(ids, slots, starts, counts)
        table[:, n:] = [[0], [self._spare], [0], [0]]
        self._inputs.copy_(self._host, non_blocking=True)
        if self._copied is None:
            return self._layers(n)
        self._copied.record()
        graph, hidden = next((graph, hidden) for size, graph, hidden in self._graphs if size >= n)
        graph.replay()
        return hidden[:n]

    def _record(self) -> list[tuple[int, Any, torch.Tensor]]:
        """(tokens, graph, its output), from few tokens to many."""
        recorded: list[tuple[int, Any, torch.Tensor]] = []
        pool = None
        # From many tokens to few: a smaller graph finds room in what a larger one took.
        for size in sorted((n for n in _SIZES if n <= self.most_tokens), reverse=True):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._layers(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = self._layers(size)
            pool = graph.pool()
            recorded.append((size, graph, hidden))
        return recorded[::-1]

    def _layers(self, num_tokens: int) -> torch.Tensor:
        token_ids, slot, start, position = self._inputs[:, :num_tokens]
        attend = self._kernels.attend if self._kernels else _attend
        add_norm = self._kernels.add_norm if self._kernels else _add_norm
        transformer = self._model.transformer
        blocks = list(transformer.blocks)
        following = [*(block.ln_1 for block in blocks[1:]), transformer.ln_f]
        x = transformer.wte(token_ids) + transformer.wpe(position)
        y = blocks[0].ln_1(x)
        for block, norm, (keys, values) in zip(blocks, following, self._kv, strict=True):
            y = block.attn.c_proj(attend(block.attn.c_attn(y), keys, values, slot, start, position))
            y = block.mlp(add_norm(x, y, block.ln_2))
            y = add_norm(x, y, norm)
        hidden: torch.Tensor = y
        return hidden


def token_table(ids: Int32, slots: Int32, starts: Int32, counts: Int32) -> npt.NDArray[np.int64]:
    """Token ids, slots, their sequences' first positions, positions: sequence b has the next ``counts[b]`` of the ids.

    Shapes: ids ``[N]``, the others ``[B]`` → ``[4, N]``.
    """
    firsts = np.cumsum(counts) - counts
    positions = np.arange(len(ids)) - np.repeat(firsts - starts, counts)
    return np.stack([ids, np.repeat(slots, counts), np.repeat(starts, counts), positions])


@functools.cache
def triton_kernels() -> ModuleType | None:
    """None where they cannot be had: PyTorch's kernels then do, with copies of K and V."""
    folder = cache_folder()
    if folder is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    try:
        from nanogpt.runner import triton_kernels

        triton_kernels.try_out()
    except Exception as error:  # Triton has no class of its own for what a compiler, a linker or a loader refuses
        logger.warning(
            "The GPU kernels cannot be compiled here (%s: %s), so PyTorch's own compute, which is slower. Triton, "
            "which comes with PyTorch on Linux, needs a C compiler and Python's headers: "
            "apt-get install gcc python3-dev.",
            type(error).__name__, next(iter(str(error).splitlines()), ""),
        )  # fmt: skip
        return None
    return triton_kernels


def _attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """``triton_kernels.attend`` in PyTorch. ``start`` is not looked at: here all K and V are written first."""
    q, k, v = qkv.view(len(qkv), 3, keys.shape[1], keys.shape[3]).unbind(1)
    keys[slot, :, position] = k
    values[slot, :, position] = v
    visible = torch.arange(keys.shape[2], device=qkv.device) <= position[:, None]
    y = F.scaled_dot_product_attention(q[:, :, None], keys[slot], values[slot], attn_mask=visible[:, None, None])
    return y.flatten(1)


def _add_norm(x: torch.Tensor, y: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """``triton_kernels.add_norm`` in PyTorch."""
    x += y
    normal: torch.Tensor = norm(x)
    return normal
