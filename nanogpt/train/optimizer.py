"""The optimizer of a run and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from nanogpt.train.config import TrainConfig
from nanogpt.train.muon import Muon


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


def create_optimizers(
    model: torch.nn.Module, config: TrainConfig, *, bf16: bool = False
) -> dict[str, torch.optim.Optimizer]:
    """AdamW in two groups (matrices and embeddings decay, biases and LayerNorms do not); with Muon for the layers'
    matrices, where the configuration asks for it (in bfloat16 where the device computes in it). By the names under
    which a checkpoint keeps their states.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    muon = {name: p for name, p in named if config.optimizer == "muon" and p.dim() == 2 and ".h." in name}
    taken = set(map(id, muon.values()))
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    adamw: torch.optim.Optimizer
    try:
        adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    except RuntimeError:  # PyTorch before 2.4 has a fused one for CUDA only
        adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)
    if not muon:
        return {"optimizer": adamw}
    matrices = [
        {"params": [p for name, p in muon.items() if "c_attn" in name], "parts": 3},  # q, k and v
        {"params": [p for name, p in muon.items() if "c_attn" not in name]},
    ]
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {
        "optimizer": adamw,
        "muon": Muon(matrices, config.muon_learning_rate, weight_decay=config.weight_decay, dtype=dtype),
    }


def set_learning_rate(optimizers: Mapping[str, torch.optim.Optimizer], config: TrainConfig, value: float) -> None:
    """``value`` is AdamW's; Muon's is in the same proportion to its own highest."""
    for name, optimizer in optimizers.items():
        scale = config.muon_learning_rate / max(config.learning_rate, 1e-12) if name == "muon" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = value * scale
