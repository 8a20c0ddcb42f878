"""Triton kernels of a decode step on a CUDA device. Imported where Triton is there: PyTorch's CUDA builds for Linux bring it.

Everything is computed in float32 and kept in the model's own type, as PyTorch's kernels do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanogpt.model.gpt import LayerNorm

_BLOCK_T = 128
"""Positions that are read at once: 32 kB of K and V of a GPT-2's head."""


def attend(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Write K and V of one token a sequence and attend to those before it, read where they lie.

    Shapes: qkv ``[R, 3 * C]``, keys and values ``[slots, H, T, D]``, slot and position ``[R]`` → ``[R, C]``.
    """
    rows, width = len(qkv), qkv.shape[1] // 3
    num_heads, head_size = keys.shape[1], keys.shape[3]
    out = torch.empty(rows, width, dtype=qkv.dtype, device=qkv.device)
    _attend[rows, num_heads](
        qkv, keys, values, out, slot, position, head_size**-0.5, width, keys.stride(0), keys.stride(1),
        D=head_size, BLOCK_D=triton.next_power_of_2(head_size), BLOCK_T=_BLOCK_T, num_warps=4,
    )  # fmt: skip
    return out


def add_norm(x: torch.Tensor, y: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """Add y to x, in place, and normalize the sum. Shapes: ``[R, C]`` twice → ``[R, C]``."""
    rows, width = x.shape
    out = torch.empty_like(x)
    bias = norm.weight if norm.bias is None else norm.bias
    _add_norm[rows,](
        x, y, out, norm.weight, bias, norm.eps, width, HAS_BIAS=norm.bias is not None,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    qkv, keys, values, out, slot, position, scale, width, stride_slot, stride_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program a row and head: a softmax that runs along the positions, as in FlashAttention."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    here = qkv + row * 3 * width + head * D + d
    q = tl.load(here, mask=inside, other=0.0).to(tl.float32) * scale
    k = tl.load(here + width, mask=inside, other=0.0)
    v = tl.load(here + 2 * width, mask=inside, other=0.0)
    length = tl.load(position + row)
    lane = tl.load(slot + row) * stride_slot + head * stride_head
    tl.store(keys + lane + length * D + d, k, mask=inside)
    tl.store(values + lane + length * D + d, v, mask=inside)

    # The token itself comes first, from its own row: what it has just written need not have arrived.
    highest = tl.sum(q * k.to(tl.float32), 0)
    total = highest * 0.0 + 1.0
    acc = v.to(tl.float32)
    t = tl.arange(0, BLOCK_T)
    for first in range(0, length, BLOCK_T):
        there = first + t < length
        tile = lane + (first + t)[:, None] * D + d[None, :]
        mask = there[:, None] & inside[None, :]
        k_tile = tl.load(keys + tile, mask=mask, other=0.0).to(tl.float32)
        v_tile = tl.load(values + tile, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(k_tile * q[None, :], 1), float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 0))
        shrink = tl.exp(highest - new_highest)
        weight = tl.exp(score - new_highest)
        acc = acc * shrink + tl.sum(weight[:, None] * v_tile, 0)
        total = total * shrink + tl.sum(weight, 0)
        highest = new_highest
    tl.store(out + row * width + head * D + d, (acc / total).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(x, y, out, weight, bias, eps, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < width
    at = row * width + c
    total = tl.load(x + at, mask=inside, other=0.0) + tl.load(y + at, mask=inside, other=0.0)
    tl.store(x + at, total, mask=inside)
    total = total.to(tl.float32)
    mean = tl.sum(total, 0) / width
    centred = tl.where(inside, total - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    normal = centred * scale * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normal += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, normal.to(out.dtype.element_ty), mask=inside)
