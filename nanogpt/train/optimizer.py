"""The optimizer of a run and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from nanogpt.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0, as a share of what the configuration calls the highest."""
    return _share(config, step) * config.learning_rate


def _share(config: TrainConfig, step: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    low = config.min_learning_rate / config.learning_rate if config.learning_rate else 0.0
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        decay = config.decay_steps or max(1, config.max_steps // 5)
        left = config.max_steps - step
        return 1.0 if left > decay else low + (1 - low) * left / decay
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def create_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices and embeddings decay, biases and LayerNorms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    try:
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    except RuntimeError:  # PyTorch before 2.4 has a fused one for CUDA only
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value
