"""Triton kernels of a step on a CUDA device. Imported where Triton is there: PyTorch's CUDA builds for Linux bring it.

Numbers are kept in the model's own type and computed in float32, as PyTorch's kernels do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanogpt.model.gpt import LayerNorm

# Sizes that were the fastest on an H100 (docs/decisions.md).
_BLOCK_T = 64
"""Positions that attention reads at once: 16 kB of K and V of a GPT-2's head."""
_BLOCK_V = 4096
"""Logits that the sampler reads at once, and the largest top_k that it has a short cut for."""
_BLOCK_KEPT = 1024
"""Candidates for a draw that it looks at at once, where there are not many more."""


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot: torch.Tensor,
    start: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Write K and V of a step's tokens; each attends to itself and to those before it in its sequence.

    A sequence's tokens are rows that follow each other; ``start`` is the position of the first of them. K and V of
    earlier positions are read where they lie. Shapes: qkv ``[N, 3 * C]``, keys and values ``[slots, H, T, D]``, slot,
    start and position ``[N]`` → ``[N, C]``.
    """
    rows, width = len(qkv), qkv.shape[1] // 3
    num_heads, head_size = keys.shape[1], keys.shape[3]
    out = torch.empty(rows, width, dtype=qkv.dtype, device=qkv.device)
    _attend[rows, num_heads](
        qkv, keys, values, out, slot, start, position, head_size**-0.5, width, keys.stride(0), keys.stride(1),
        D=head_size, BLOCK_D=triton.next_power_of_2(head_size), BLOCK_T=_BLOCK_T, num_warps=4,
    )  # fmt: skip
    return out


def add_norm(x: torch.Tensor, y: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """Add y to x, in place, and normalize the sum. Shapes: ``[N, C]`` twice → ``[N, C]``."""
    rows, width = x.shape
    out = torch.empty_like(x)
    bias = norm.weight if norm.bias is None else norm.bias
    _add_norm[rows,](
        x, y, out, norm.weight, bias, norm.eps, width, HAS_BIAS=norm.bias is not None,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


def draw(logits: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Temperature and all that follows it, as ``nanogpt.runner.sampler`` lists it; -1 where logits are not finite.

    Shapes: logits float32 ``[R, V]``; table float64 ``[6, R]``: temperature, top_k, top_p, min_p, greedy, random number
    → ``[R]``.
    """
    rows, num_tokens = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    ids = torch.empty(rows, num_tokens, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, num_tokens, dtype=torch.float32, device=logits.device)
    _draw[rows,](
        logits, table, out, ids, weights, rows, num_tokens, logits.stride(0),
        BLOCK=_BLOCK_V, KEPT=_BLOCK_KEPT, num_warps=8,
    )  # fmt: skip
    return out


def try_out() -> None:
    """Compile the draw and run it. Raises: what Triton raises where it cannot compile."""
    table = torch.tensor([[1.0], [2.0], [1.0], [0.0], [0.0], [0.5]], dtype=torch.float64, device="cuda")
    draw(torch.zeros(1, 8, device="cuda"), table)
    torch.cuda.synchronize()


@triton.jit
def _attend(
    qkv, keys, values, out, slot, start, position, scale, width, stride_slot, stride_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program a row and head. Each of BLOCK_T lanes runs a softmax of its own, along every BLOCK_T-th position, as
    FlashAttention's does along all; the lanes are joined at the end. So nothing waits for other lanes on the way."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    t = tl.arange(0, BLOCK_T)
    here = qkv + row * 3 * width + head * D + d
    q = tl.load(here, mask=inside, other=0.0).to(tl.float32) * scale
    first_new, last = tl.load(start + row), tl.load(position + row)
    lane = tl.load(slot + row) * stride_slot + head * stride_head
    tl.store(keys + lane + last * D + d, tl.load(here + width, mask=inside, other=0.0), mask=inside)
    tl.store(values + lane + last * D + d, tl.load(here + 2 * width, mask=inside, other=0.0), mask=inside)

    highest = tl.full([BLOCK_T], -1e30, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, first_new, BLOCK_T):
        there = first + t < first_new
        tile = lane + (first + t)[:, None] * D + d[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(keys + tile, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + tile, mask=mask, other=0.0).to(tl.float32)
        highest, total, acc = _softmax_step(q, k, v, there, highest, total, acc)
    # What this step computes itself is read from the step's own rows: other programs are still writing it.
    for first in range(first_new, last + 1, BLOCK_T):
        there = first + t <= last
        tile = qkv + (row - last + first + t)[:, None] * 3 * width + width + head * D + d[None, :]
        mask = there[:, None] & inside[None, :]
        k = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(tile + width, mask=mask, other=0.0).to(tl.float32)
        highest, total, acc = _softmax_step(q, k, v, there, highest, total, acc)
    share = tl.exp(highest - tl.max(highest, 0))
    y = tl.sum(acc * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + row * width + head * D + d, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_step(q, k, v, there, highest, total, acc):
    score = tl.where(there, tl.sum(k * q[None, :], 1), -1e30)
    new_highest = tl.maximum(highest, score)
    shrink = tl.exp(highest - new_highest)
    weight = tl.where(there, tl.exp(score - new_highest), 0.0)
    return new_highest, total * shrink + weight, acc * shrink[:, None] + weight[:, None] * v


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


@triton.jit
def _key(x):
    """Integers in the order of the floats."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)  # -0.0 is 0.0
    return tl.where((bits >> 31) > 0, ~bits, bits | (tl.full([], 1, tl.uint32) << 31))


# Compiled once, whatever the number of rows: the first request of a kind must not wait for a compiler.
@triton.jit(do_not_specialize=["rows", "num_tokens", "stride"])
def _draw(logits, table, out, ids, weights, rows, num_tokens, stride, BLOCK: tl.constexpr, KEPT: tl.constexpr):
    """One program a row. Thresholds (the k-th largest, the nucleus) are found bit by bit, from the highest down."""
    row = tl.program_id(0)
    logits += row * stride
    ids += row * num_tokens
    weights += row * num_tokens
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_tokens, BLOCK):
        x = tl.load(logits + first + lane, mask=first + lane < num_tokens, other=float("-inf"))
        bad = bad | ((x != x) | (x == float("inf"))).to(tl.int32)
        top = tl.maximum(top, x)
    highest = tl.max(top, 0)
    finite = (tl.max(bad, 0) == 0) & (highest > float("-inf"))
    token = tl.full([], -1, tl.int32)
    if finite:
        if tl.load(table + 4 * rows + row) > 0.0:
            best = tl.full([BLOCK], 2147483647, tl.int32)
            for first in range(0, num_tokens, BLOCK):
                x = tl.load(logits + first + lane, mask=first + lane < num_tokens, other=float("-inf"))
                best = tl.minimum(best, tl.where(x == highest, first + lane, 2147483647))
            token = tl.min(best, 0)
        else:
            temperature = tl.load(table + row)
            top_k = tl.load(table + rows + row).to(tl.int32)
            top_p = tl.load(table + 2 * rows + row)
            min_p = tl.load(table + 3 * rows + row)
            # The k-th largest of the lanes' maxima is no larger than the k-th largest of all: few are not below it.
            bound = tl.full([], 0, tl.uint32)
            if top_k < num_tokens and top_k <= BLOCK:
                maxima = _key(top)
                for i in range(32):
                    trial = bound | (tl.full([], 1, tl.uint32) << (31 - i))
                    bound = tl.where(tl.sum((maxima >= trial).to(tl.int32), 0) >= top_k, trial, bound)
            kept = 0
            for first in range(0, num_tokens, BLOCK):
                x = tl.load(logits + first + lane, mask=first + lane < num_tokens, other=float("-inf"))
                take = (first + lane < num_tokens) & (_key(x) >= bound)
                place = kept + tl.cumsum(take.to(tl.int32), 0) - 1
                tl.store(ids + place, first + lane, mask=take)
                tl.store(weights + place, x, mask=take)
                kept += tl.sum(take.to(tl.int32), 0)
            tl.debug_barrier()
            random = tl.load(table + 5 * rows + row)
            if kept <= KEPT:
                token = _draw_kept(ids, weights, kept, highest, temperature, top_k, top_p, min_p, random, KEPT)
            else:
                token = _draw_kept(ids, weights, kept, highest, temperature, top_k, top_p, min_p, random, BLOCK)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _draw_kept(ids, weights, kept, highest, temperature, top_k, top_p, min_p, random, BLOCK: tl.constexpr):
    """Draw one of the candidates, whose logits lie in ``weights`` in the order of their ids."""
    lane = tl.arange(0, BLOCK)
    one = tl.full([], 1, tl.uint32)
    # Exactly top_k: what is above the k-th largest, and of its equals the first ones.
    kth = tl.full([], 0, tl.uint32)
    room = kept
    if top_k < kept:
        for i in range(32):
            trial = kth | (one << (31 - i))
            count = tl.zeros([BLOCK], tl.int32)
            for first in range(0, kept, BLOCK):
                x = tl.load(weights + first + lane, mask=first + lane < kept, other=float("-inf"))
                count += ((first + lane < kept) & (_key(x) >= trial)).to(tl.int32)
            kth = tl.where(tl.sum(count, 0) >= top_k, trial, kth)
        count = tl.zeros([BLOCK], tl.int32)
        for first in range(0, kept, BLOCK):
            x = tl.load(weights + first + lane, mask=first + lane < kept, other=float("-inf"))
            count += ((first + lane < kept) & (_key(x) > kth)).to(tl.int32)
        room = top_k - tl.sum(count, 0)
        tl.debug_barrier()
    sums = tl.zeros([BLOCK], tl.float64)
    equals = 0
    for first in range(0, kept, BLOCK):
        inside = first + lane < kept
        x = tl.load(weights + first + lane, mask=inside, other=float("-inf"))
        equal = (inside & (_key(x) == kth)).to(tl.int32)
        takes = inside & ((_key(x) > kth) | ((equal > 0) & (equals + tl.cumsum(equal, 0) <= room)))
        # Divided in float64: no temperature, however small, is zero there.
        w = tl.where(takes, tl.exp(((x - highest).to(tl.float64) / temperature).to(tl.float32)), 0.0)
        tl.store(weights + first + lane, w, mask=inside)
        sums += w.to(tl.float64)
        equals += tl.sum(equal, 0)
    tl.debug_barrier()

    # The nucleus: the largest weight for which those not below it reach their share, and of its equals what it takes.
    least = tl.full([], 0, tl.uint32)
    few = kept
    if top_p < 1.0:
        goal = top_p * tl.sum(sums, 0)
        for i in range(30):  # weights are 1 at most: the two highest bits are never set
            trial = least | (one << (29 - i))
            sums = tl.zeros([BLOCK], tl.float64)
            for first in range(0, kept, BLOCK):
                w = tl.load(weights + first + lane, mask=first + lane < kept, other=0.0)
                sums += tl.where(w.to(tl.uint32, bitcast=True) >= trial, w, 0.0).to(tl.float64)
            least = tl.where(tl.sum(sums, 0) >= goal, trial, least)
        sums = tl.zeros([BLOCK], tl.float64)
        for first in range(0, kept, BLOCK):
            w = tl.load(weights + first + lane, mask=first + lane < kept, other=0.0)
            sums += tl.where(w.to(tl.uint32, bitcast=True) > least, w, 0.0).to(tl.float64)
        each = least.to(tl.float32, bitcast=True).to(tl.float64)
        few = tl.where(each > 0.0, tl.maximum(tl.ceil((goal - tl.sum(sums, 0)) / each), 1.0), 0.0).to(tl.int32)
        tl.debug_barrier()
    sums = tl.zeros([BLOCK], tl.float64)
    equals = 0
    for first in range(0, kept, BLOCK):
        inside = first + lane < kept
        w = tl.load(weights + first + lane, mask=inside, other=0.0)
        key = w.to(tl.uint32, bitcast=True)
        equal = (inside & (key == least)).to(tl.int32)
        takes = inside & ((key > least) | ((equal > 0) & (equals + tl.cumsum(equal, 0) <= few)))
        w = tl.where(takes & (w.to(tl.float64) >= min_p), w, 0.0)
        tl.store(weights + first + lane, w, mask=inside)
        sums += w.to(tl.float64)
        equals += tl.sum(equal, 0)
    tl.debug_barrier()

    # The first candidate at which the sum of the weights exceeds the random number's share of their total.
    target = random * tl.sum(sums, 0)
    drawn = 2147483647
    last = 0
    before = tl.full([], 0.0, tl.float64)
    for first in range(0, kept, BLOCK):
        w = tl.load(weights + first + lane, mask=first + lane < kept, other=0.0).to(tl.float64)
        reached = before + tl.cumsum(w, 0)
        drawn = tl.minimum(drawn, tl.min(tl.where((w > 0.0) & (reached > target), first + lane, 2147483647), 0))
        last = tl.maximum(last, tl.max(tl.where(w > 0.0, first + lane, 0), 0))
        before += tl.sum(w, 0)
    # Rounding may leave the sum below the target: then it is the last one.
    return tl.load(ids + tl.minimum(drawn, last))
