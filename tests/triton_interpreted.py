"""The GPU's kernels run by Triton's interpreter, on a CPU, against the same in PyTorch.

A program of its own: Triton looks at TRITON_INTERPRET when it is imported, and other tests may need it otherwise.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from nanogpt.model.config import GPTConfig
from nanogpt.model.gpt import LayerNorm
from nanogpt.runner import sampler_torch, step_graphs, triton_kernels


def check_attention(num_heads: int, head_size: int, context: int) -> None:
    """Prompts, their later parts and single tokens of six sequences in one step."""
    kv = torch.randn(2, 7, num_heads, context, head_size)
    parts = [(3, 0, 5), (1, context - 1, 1), (6, context // 2, 7), (0, 5, 1), (2, 0, 1), (4, 1, context - 1)]
    rows = [(slot, start, start + i) for slot, start, n in parts for i in range(n)]
    slot, start, position = torch.tensor(rows).T.contiguous()
    qkv = torch.randn(len(rows), 3 * num_heads * head_size)
    ours, theirs = kv.clone(), kv.clone()
    y = triton_kernels.attend(qkv, *ours, slot, start, position)
    expected = step_graphs._attend(qkv, *theirs, slot, start, position)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def check_norm(width: int, bias: bool) -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=width, block_size=8, vocab_size=8, num_tokens=8, bias=bias)
    norm = LayerNorm(config)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x, y = torch.randn(3, width), torch.randn(3, width)
    sums = x.clone()
    normal = triton_kernels.add_norm(sums, y, norm)
    torch.testing.assert_close(sums, x + y, atol=0, rtol=0)
    torch.testing.assert_close(normal, norm(x + y), atol=1e-5, rtol=1e-5)


def check_draw(seed: int) -> None:
    """Ties, infinities, NaN, masks and every parameter: the ids have to be the same ones."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([5, 37, 300, 5000, 9000]))
    x = rng.standard_normal((2, size)) * rng.choice([0.1, 1, 3])
    if rng.random() < 0.5:
        x = np.round(x * 4) / 4
    if rng.random() < 0.2:
        x[:, rng.random(size) < 0.7] = -np.inf
    if rng.random() < 0.1:
        x[0, rng.integers(size)] = rng.choice([np.nan, np.inf])
    if rng.random() < 0.1:
        x[0] = -np.inf
    table = np.stack(
        [
            rng.choice([5e-324, 0.01, 0.7, 1, 2], 2),
            np.minimum(rng.choice([1, 2, 5, 40, 200, 4500, size], 2), size),
            rng.choice([1.0, 0.9, 0.5, 0.01], 2),
            rng.choice([0, 0, 0.05, 0.5, 1.0], 2),
            rng.choice([0, 0, 0, 1], 2),
            rng.random(2),
        ]
    )
    logits = torch.from_numpy(x.astype(np.float32))
    drawn = triton_kernels.draw(logits, torch.from_numpy(table)).tolist()
    expected = sampler_torch.draw(logits, torch.from_numpy(table)).tolist()
    assert drawn == expected, (seed, table.T.tolist())


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        for shape in ((2, 8, 24), (1, 64, 150), (2, 80, 100)):
            check_attention(*shape)
        for width, bias in ((16, True), (51, False), (768, True)):
            check_norm(width, bias)
        for seed in range(25):
            check_draw(seed)
