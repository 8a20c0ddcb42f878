"""Protects Muon: it is PyTorch's own step, in float32, and takes stacked matrices apart."""

from __future__ import annotations

import pytest
import torch

from nanogpt.train.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalized(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has its own Muon since 2.9")
@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_it_takes_the_steps_of_pytorchs_own(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [Muon([ours], 0.02, dtype=torch.bfloat16), torch.optim.Muon([theirs], 0.02)]
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    # Both round to bfloat16 on the way, in another order: the steps are 0.02 long.
    assert (ours - theirs).abs().max() < 0.002


def test_parts_are_orthogonalized_each_for_itself() -> None:
    gradient = torch.randn(48, 16, generator=torch.Generator().manual_seed(3))
    whole = torch.nn.Parameter(torch.zeros(48, 16))
    parts = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    whole.grad = gradient
    for i, part in enumerate(parts):
        part.grad = gradient[16 * i : 16 * (i + 1)]
    Muon([{"params": [whole], "parts": 3}], 0.1, dtype=torch.float32).step()
    Muon(parts, 0.1, dtype=torch.float32).step()
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in parts]))
