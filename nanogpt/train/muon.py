"""Muon, an optimizer for matrices: momentum whose singular values are all brought near one.

PyTorch has one since 2.9. It multiplies in bfloat16 whatever the device is, which on a CPU without bfloat16 takes
thirty times as long as float32 (and most of a small model's step), and one matrix after the other. This one takes the
arithmetic it is told, orthogonalizes matrices of one shape together, and q, k and v each for itself.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# The quintic whose iteration brings every singular value in (0, 1] between about 0.7 and 1.2 in five turns.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TURNS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """``params`` are matrices, or groups with ``parts``: how many matrices, one above the other, each of them holds.

    ``dtype`` is what the orthogonalization is computed in.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, weight_decay: float = 0.1, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "parts": 1})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._momentum(parameter) for parameter in parameters])
                matrices = updates.view(-1, shape[0] // group["parts"], shape[1])
                updates = orthogonalized(matrices.to(self._dtype)).view(updates.shape)
                # An update of an orthogonal matrix is as large in each entry as the longer side makes it.
                size = max(1.0, matrices.shape[1] / matrices.shape[2]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * size)

    def _momentum(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Nesterov's: the gradient as it will look after this step."""
        state = self.state[parameter]
        assert parameter.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer: torch.Tensor = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - _MOMENTUM)
        return parameter.grad.lerp(buffer, _MOMENTUM)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Each matrix with its singular values near one. Shapes: ``[B, rows, columns]``, the same."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    wide = wide / wide.flatten(1).norm(dim=1).clamp(min=1e-7).view(-1, 1, 1)
    a, b, c = _COEFFICIENTS
    for _ in range(_TURNS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if matrices.shape[1] > matrices.shape[2] else wide
