"""The sampler on a CUDA device: the steps of ``nanogpt.runner.sampler``, the reference, on the device.

Shapes do not depend on the data, so nothing waits for the device: the caller transfers the drawn ids, once a step.
Random numbers and penalties are prepared on the host, from what the host knows anyway. It exists beside the reference
because rows of 50,000 logits should not leave the device, and because a CPU must be served without PyTorch. The draw is
one kernel where Triton is there, and PyTorch's operations elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nanogpt.runner.philox import uniforms
from nanogpt.runner.sampler import Row, adjustment, forbidden
from nanogpt.runner.step_graphs import triton_kernels


def sample(logits: torch.Tensor, rows: Sequence[Row], num_tokens: int) -> torch.Tensor:
    """One token id for each row, on the device; -1 where the logits are not finite. Shapes: ``[R, V]`` → ``[R]``."""
    model = logits[:, :num_tokens]
    logits = _masked(_adjusted(model, rows), rows)
    params = [row.state.params for row in rows]
    if all(p.greedy for p in params):
        highest, best = logits.max(dim=1)
        # A mask may hide what is not finite.
        finite = highest.isfinite() if logits is model else model.amax(dim=1).isfinite()
        return torch.where(finite, best, -1)
    table = np.stack(
        [
            [1.0 if p.greedy else p.temperature for p in params],
            [min(p.top_k or num_tokens, num_tokens) for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.greedy for p in params],
            uniforms([row.state.seed for row in rows], [row.output_index for row in rows]),
        ]
    )
    kernels = triton_kernels() if logits.is_cuda else None
    drawn: torch.Tensor = (kernels.draw if kernels else draw)(logits, upload(table, logits.device))
    return drawn if logits is model else torch.where(model.amax(dim=1).isfinite(), drawn, -1)


def draw(logits: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``triton_kernels.draw`` in PyTorch: temperature and all that follows it; -1 where the logits are not finite.

    Shapes: logits ``[R, V]``; table float64 ``[6, R]``: temperature, top_k, top_p, min_p, greedy, random number →
    ``[R]``.
    """
    temperature, top_k, top_p, min_p, greedy, random = table[:, :, None]
    highest, best = logits.max(dim=1)
    weights = ((logits.double() - highest.double()[:, None]) / temperature).exp()
    weights = weights * _among_largest(logits, top_k.long())
    weights = weights * (_in_nucleus(weights, top_p) | (top_p >= 1.0))
    weights = weights * (weights >= min_p)
    cumulative = weights.cumsum(dim=1)
    drawn = torch.searchsorted(cumulative, random * cumulative[:, -1:], right=True)[:, 0]
    return torch.where(highest.isfinite(), torch.where(greedy[:, 0] > 0, best, drawn), -1)


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array on the device, behind what is queued there already; a blocking copy would wait for all of that."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _adjusted(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    changes = [(i, change) for i, row in enumerate(rows) if (change := adjustment(row)) is not None]
    if not changes:
        return logits
    places = np.stack(
        [
            np.concatenate([np.full(len(change.ids), i) for i, change in changes]),
            np.concatenate([change.ids for _, change in changes]),
        ]
    )
    values = np.stack([np.concatenate(column) for column in zip(*(change[1:] for _, change in changes), strict=True)])
    row_of, ids = upload(places, logits.device)
    bias, factor, penalty = upload(values, logits.device)
    x = logits[row_of, ids].double() + bias
    x = torch.where(x > 0, x / factor, x * factor) - penalty
    return logits.index_put((row_of, ids), x.to(logits.dtype))


def _masked(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """-inf for what the rows' masks do not allow."""
    masks = [(i, row.state.mask) for i, row in enumerate(rows) if row.state.mask is not None]
    if not masks:
        return logits
    hidden = np.zeros(logits.shape, np.bool_)
    for i, mask in masks:
        hidden[i] = forbidden(mask, logits.shape[1])
    return logits.masked_fill(upload(hidden, logits.device), -torch.inf)


def _among_largest(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Which ids are among the k largest of their row: exactly k, ties to the lower id. Shapes: k ``[R, 1]``."""
    kth = logits.sort(dim=1, descending=True).values.gather(1, k - 1)
    above = logits > kth
    equal = logits == kth
    room = k - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= room))


def _in_nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest set of the most probable ids whose share of the weight reaches ``top_p``, at least one."""
    best_first, ids = weights.sort(dim=1, descending=True, stable=True)
    cumulative = best_first.cumsum(dim=1)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 1:] = cumulative[:, :-1] < top_p * cumulative[:, -1:]
    return torch.zeros_like(keep).scatter(1, ids, keep)
