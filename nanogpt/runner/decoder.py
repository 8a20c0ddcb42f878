"""One token for each of several sequences on a CUDA device, all kernels of the step launched as one.

A step of one token a sequence is over a hundred small kernels, and launching them one by one from Python takes ten
times as long as they compute. So they are recorded once, as a CUDA graph, and played. A graph's shapes are fixed: there
is one for 1, 2, 4, 8, 16 .. rows, and rows that no sequence needs compute a token in a slot that is nobody's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nanogpt.model.gpt import GPT, LayerNorm
from nanogpt.runner.base import Int32

_WARM_UPS = 2
"""Runs before a recording: libraries choose and load their kernels, which cannot be recorded."""


class Decoder:
    """``kv`` ``[L, 2, slots, H, T, D]``: the last slot is the one that is nobody's. Used by one thread at a time.

    Recording everything when the server starts takes a second or two, and no memory has to be found later.
    """

    def __init__(self, model: GPT, kv: torch.Tensor) -> None:
        self._model = model
        self._kv = kv
        self._spare = kv.shape[2] - 1
        on_device = kv.device.type == "cuda"
        self._kernels = _triton_kernels() if on_device else None
        # Token ids, positions, slots: one transfer a step, from memory that the device reads by itself.
        self._host = torch.zeros(3, self._spare, dtype=torch.int64, pin_memory=on_device)
        self._inputs = self._host.to(kv.device)
        self._graphs = self._record() if on_device else []

    def step(self, token_ids: Int32, positions: Int32, slots: Int32) -> torch.Tensor:
        """Write K and V; the hidden states that the head takes, valid until the next step. Shapes: ``[R]`` → ``[R, C]``."""
        rows = len(token_ids)
        table = self._host.numpy()
        table[:, :rows] = token_ids, positions, slots
        table[:, rows:] = [[0], [0], [self._spare]]
        self._inputs.copy_(self._host, non_blocking=True)
        for size, graph, hidden in self._graphs:
            if size >= rows:
                graph.replay()
                return hidden[:rows]
        return self._layers(rows)

    def _record(self) -> list[tuple[int, Any, torch.Tensor]]:
        """(rows, graph, its output), from few rows to many."""
        recorded: list[tuple[int, Any, torch.Tensor]] = []
        self._inputs[2] = self._spare
        pool = None
        # From many rows to few: a smaller graph finds room in what a larger one took.
        for size in reversed(sizes(self._spare)):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._layers(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden = self._layers(size)
            pool = graph.pool()
            recorded.append((size, graph, hidden))
        return recorded[::-1]

    def _layers(self, rows: int) -> torch.Tensor:
        token_ids, position, slot = self._inputs[:, :rows]
        attend, add_norm = (
            (self._kernels.attend, self._kernels.add_norm) if self._kernels else (_attend, _add_norm)
        )  # fmt: skip
        transformer = self._model.transformer
        blocks = list(transformer.blocks)
        following = [*(block.ln_1 for block in blocks[1:]), transformer.ln_f]
        x = transformer.wte(token_ids) + transformer.wpe(position)
        y = blocks[0].ln_1(x)
        for block, norm, (keys, values) in zip(blocks, following, self._kv, strict=True):
            y = block.attn.c_proj(attend(block.attn.c_attn(y), keys, values, slot, position))
            y = block.mlp(add_norm(x, y, block.ln_2))
            y = add_norm(x, y, norm)
        return y


def sizes(most: int) -> list[int]:
    """How many rows there are graphs for: few are wasted, and few have to be recorded."""
    return sorted({n for n in (1, 2, 4, 8, *range(16, most, 16)) if n < most} | {most})


def _triton_kernels() -> ModuleType | None:
    """None without Triton (Windows): PyTorch's kernels then do, with copies of K and V."""
    try:
        from nanogpt.runner import decoder_kernels
    except ImportError:
        return None
    return decoder_kernels


def _attend(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """``decoder_kernels.attend`` in PyTorch."""
    q, k, v = qkv.view(len(qkv), 3, keys.shape[1], keys.shape[3]).unbind(1)
    keys[slot, :, position] = k
    values[slot, :, position] = v
    visible = torch.arange(keys.shape[2], device=qkv.device) <= position[:, None]
    y = F.scaled_dot_product_attention(q[:, :, None], keys[slot], values[slot], attn_mask=visible[:, None, None])
    return y.flatten(1)


def _add_norm(x: torch.Tensor, y: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """``decoder_kernels.add_norm`` in PyTorch."""
    x += y
    normal: torch.Tensor = norm(x)
    return normal
