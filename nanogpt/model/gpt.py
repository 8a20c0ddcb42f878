"""The GPT in PyTorch: what training trains, and the oracle that every runner is held against.

One architecture for the whole GPT-2 family; what differs (GELU, biases, tied head, MLP width) is in ``GPTConfig``.
Parameters are named as ``GPTConfig.tensor_shapes()`` says, so a checkpoint's tensors are this module's state dict.
This file computes whole texts; K and V are kept between steps in ``nanogpt.runner.torch``, with these same layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanogpt.model.config import GPTConfig


class StoredTensor(Protocol):
    """A checkpoint's tensor, as far as a model has to know it."""

    def float32(self) -> npt.NDArray[np.float32]: ...


class StoredModel(Protocol):
    """A checkpoint, as far as a model has to know it."""

    @property
    def config(self) -> GPTConfig: ...

    @property
    def tensors(self) -> Mapping[str, Any]:
        """StoredTensors, named and shaped as ``config.tensor_shapes()`` says."""
        ...


class LayerNorm(nn.Module):
    """nn.LayerNorm with an optional bias (PyTorch before 2.1 has none)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps = config.layer_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Dropout:
    """How much is dropped while training: of what a layer adds, and of its attention's weights.

    The latter keeps PyTorch from fused attention on a CPU, where it doubles the time of a small model's step.
    """

    residual: float = 0.0
    attention: float = 0.0


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, dropout: Dropout) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = dropout

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values. Shapes: ``[..., C]`` → three of ``[..., H, D]``."""
        qkv: torch.Tensor = self.c_attn(x)
        return qkv.view(*qkv.shape[:-1], 3, self.n_head, -1).unbind(-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.transpose(-3, -2) for y in self.project(x))
        y = _attend(q, k, v, self.dropout.attention if self.training else 0.0)
        return F.dropout(self.c_proj(y.transpose(-3, -2).flatten(-2)), self.dropout.residual, self.training)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """Causal attention. Shapes: three of ``[..., H, T, D]`` → ``[..., H, T, D]``."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    # Training under autocast: PyTorch's backward of this in bfloat16 on a CPU takes five times float32's time, more
    # than bfloat16 saves everywhere else.
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, dropout_p=dropout)
    return y.to(q.dtype)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        # nanoGPT uses the exact GELU, everybody else the tanh approximation: the difference shows in the text.
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.c_fc(x), approximate=self.approximate)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, dropout: Dropout) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, dropout)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, dropout.residual)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Token ids to the last hidden state, before the head."""

    def __init__(self, config: GPTConfig, dropout: Dropout) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.dropout = dropout.residual

    @property
    def blocks(self) -> Iterator[Block]:
        return cast("Iterator[Block]", iter(self.h))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(idx.shape[-1], device=idx.device)
        x: torch.Tensor = F.dropout(self.wte(idx) + self.wpe(positions), self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, *, dropout: Dropout = Dropout()) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, dropout)
        # A tied head is the embedding itself and no parameter of its own, so that names and checkpoints agree.
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """GPT-2's initialisation, as nanoGPT has it. Source: GPT-2 paper, section 2.3 (residual layers scaled)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: ``[..., C]`` → logits ``[..., V]``."""
        return F.linear(x, self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of every position, and with targets the mean cross-entropy (targets of -1 do not count).

        Shapes: idx and targets ``[B, T]`` with T at most ``block_size`` → logits ``[B, T, V]``.
        """
        logits = self.head(self.transformer(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: StoredModel,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        dropout: Dropout = Dropout(),
    ) -> GPT:
        """A model with a copy of the checkpoint's weights; the file may change or go afterwards.

        One tensor at a time is converted, so the peak is the model's size and one tensor.
        """
        with torch.device("meta"):  # neither allocates nor draws random weights
            model = cls(checkpoint.config, dropout=dropout)
        weights = {name: _to_torch(tensor, device, dtype) for name, tensor in checkpoint.tensors.items()}
        model.load_state_dict(weights, strict=True, assign=True)
        return model


def _to_torch(tensor: StoredTensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    # A copy even where the file already holds float32: a file that training writes anew would otherwise pull the
    # weights from under a running server.
    return torch.from_numpy(tensor.float32().copy()).to(device=device, dtype=dtype)
