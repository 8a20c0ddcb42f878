"""The PyTorch runner, for CPU and CUDA: the layers of ``nanogpt.model.gpt`` over K and V that are kept between steps.

A step's N tokens, of whatever sequences, go through every layer but attention as one matrix ``[N, C]``; attention goes
by groups (see ``_Group``); the head is computed for the rows that are sampled, and for no others. Used by the engine's
thread. On a device nothing waits for it before the drawn ids are transferred, once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanogpt.errors import SettingsError
from nanogpt.model.gpt import GPT, StoredModel
from nanogpt.runner import sampler, sampler_torch
from nanogpt.runner.base import Batch, Float32, Int32, StepOutput
from nanogpt.runner.cpus import usable_cpus
from nanogpt.runner.sampler_torch import upload

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HEAD_ROWS = 64
"""Rows whose logits are held at once where many are wanted for their log probabilities (a row of GPT-2's: 200 kB)."""


@dataclass(slots=True)
class _Group:
    """Sequences whose attention is computed by one call: rows ``first .. stop`` of the step, the same number for each.

    One sequence reads its K and V where they lie. Several, one token each, are gathered and masked to the longest.
    """

    first: int
    stop: int
    num_sequences: int
    slots: slice | torch.Tensor
    length: int
    causal: bool
    mask: torch.Tensor | None


class TorchRunner:
    """See ``nanogpt.runner.base.Runner``. ``precision``: fp32, bf16 or fp16; auto is fp32 on a CPU and 16 bits on CUDA.

    ``threads`` (CPU) is PyTorch's own, one number for the whole process; 0: as many as the container may use.
    """

    name = "torch"
    same_bits = False
    int8_matrices: list[str] | None = None

    def __init__(
        self,
        checkpoint: StoredModel,
        *,
        device: str = "cpu",
        precision: str = "auto",
        num_slots: int = 32,
        threads: int = 0,
    ) -> None:
        if device == "cpu":
            # What OMP_NUM_THREADS or the caller already lowered stays low.
            torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cpus()))
        if precision == "auto":
            precision = "fp32" if device == "cpu" else _device_precision()
        if precision not in _DTYPES:
            raise SettingsError(
                f"precision is {precision!r}; the PyTorch runner computes in {', '.join(_DTYPES)}.",
                remedy="Choose one of these, or --runner native on a CPU.",
                field="precision",
            )
        self.config = checkpoint.config
        self.num_slots = num_slots
        self.device = device
        self.precision = self.arithmetic = precision
        self._device = torch.device(device)
        # On a CPU copying K and V together costs more than the calls that it saves, and a sequence's attention does
        # not depend on who else is in the batch.
        self._share_calls = device != "cpu"
        self._model = GPT.from_checkpoint(checkpoint, device=self._device, dtype=_DTYPES[precision]).eval()
        self._kv = self._allocate()

    def _allocate(self) -> torch.Tensor:
        """K and V, all zero: stale numbers under a mask do no harm, NaN would. Shapes: ``[L, 2, slots, H, T, D]``."""
        c = self.config
        shape = (c.n_layer, 2, self.num_slots, c.n_head, c.block_size, c.head_size)
        dtype = _DTYPES[self.precision]
        if self.device != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self._device)
        # NumPy's zeros are the kernel's: a page is committed when it is first written. PyTorch would write them all.
        bits = np.zeros(shape, np.int32 if dtype.itemsize == 4 else np.int16)
        return torch.from_numpy(bits).view(dtype)

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepOutput:
        """Compute the batch's tokens, write their K and V, sample."""
        rows = sampler.sampled_rows(batch)
        hidden = self._forward(batch)
        num_tokens = self.config.num_tokens
        output = StepOutput([[] for _ in batch.sampling])
        if rows:
            if len(rows) < len(hidden):
                picked = hidden.index_select(0, upload(np.array([row.token for row in rows]), self._device))
            else:
                picked = hidden
            logits = self._model.head(picked).float()
            if self.device == "cpu":
                drawn = sampler.sample(logits.numpy(), rows, num_tokens)
            else:
                drawn = sampler_torch.sample(logits, rows, num_tokens).tolist()
                if min(drawn) < 0:
                    raise sampler.not_finite()
            wanted = any(row.state.params.logprobs is not None for row in rows)
            output = sampler.step_output(batch, rows, drawn, logits.cpu().numpy() if wanted else None, num_tokens)
        firsts = np.cumsum(batch.num_tokens) - batch.num_tokens
        for b, asked in (batch.prompt_logprobs or {}).items():
            entries = output.prompt_logprobs[b] = []
            for i in range(0, len(asked.following), _HEAD_ROWS):
                following = asked.following[i : i + _HEAD_ROWS]
                first = int(firsts[b]) + i
                logits = self._model.head(hidden[first : first + len(following)]).float()
                entries += sampler.token_logprobs(logits.cpu().numpy(), following, asked.num_top, num_tokens)
        return output

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy K and V of the first positions of one slot to another."""
        self._kv[:, :, target, :, :num_tokens] = self._kv[:, :, source, :, :num_tokens]

    @torch.inference_mode()
    def logits(self, token_ids: Int32) -> Float32:
        """Logits of every position of one text, outside all slots. Shapes: ``[T]`` → ``[T, V]``."""
        idx = upload(np.asarray(token_ids, np.int64), self._device)
        logits, _ = self._model(idx[None])
        result: Float32 = logits[0].float().cpu().numpy()
        return result

    def close(self) -> None:
        """Give back memory and threads; the runner is not used again."""
        del self._model, self._kv

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Write the batch's K and V. Returns the hidden states that the head takes. Shapes: ``[N, C]``."""
        counts = batch.num_tokens
        firsts = np.cumsum(counts) - counts
        positions = np.arange(len(batch.token_ids)) - np.repeat(firsts - batch.starts, counts)
        table = np.stack([batch.token_ids, positions, np.repeat(batch.slots, counts)])
        token_ids, position, slot = upload(table.astype(np.int64), self._device)
        groups = self._groups(batch, firsts, position, slot)
        transformer = self._model.transformer
        x = transformer.wte(token_ids) + transformer.wpe(position)
        for block, (keys, values) in zip(transformer.blocks, self._kv, strict=True):
            q, k, v = block.attn.project(block.ln_1(x))
            keys[slot, :, position] = k
            values[slot, :, position] = v
            y = torch.cat([_attend(q, keys, values, group) for group in groups])
            x = x + block.attn.c_proj(y)
            x = x + block.mlp(block.ln_2(x))
        hidden: torch.Tensor = transformer.ln_f(x)
        return hidden

    def _groups(self, batch: Batch, firsts: Int32, position: torch.Tensor, slot: torch.Tensor) -> list[_Group]:
        """How this step's attention is divided. On a device, runs of sequences with one token each share a call."""
        groups: list[_Group] = []
        lengths = (batch.starts + batch.num_tokens).tolist()
        for b, (first, n, length) in enumerate(zip(firsts.tolist(), batch.num_tokens.tolist(), lengths, strict=True)):
            last = groups[-1] if groups else None
            if self._share_calls and n == 1 and last is not None and last.stop - last.first == last.num_sequences:
                last.stop += 1
                last.num_sequences += 1
                last.length = max(last.length, length)
                continue
            whole = n == length  # nothing came before: PyTorch's own causal mask is the faster one
            mask = None
            if n > 1 and not whole:
                mask = torch.ones(n, length, dtype=torch.bool, device=self._device).tril(length - n)
            only = int(batch.slots[b])
            groups.append(_Group(first, first + n, 1, slice(only, only + 1), length, n > 1 and whole, mask))
        for group in groups:
            if group.num_sequences > 1:
                rows = slice(group.first, group.stop)
                group.slots = slot[rows]
                visible = torch.arange(group.length, device=self._device) <= position[rows, None]
                group.mask = visible[:, None, None]
        return groups


def _device_precision() -> str:
    # From Ampere on. torch.cuda.is_bf16_supported is true also where the device only emulates it.
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _Group) -> torch.Tensor:
    """One group's attention. Shapes: q ``[N, H, D]``, keys and values ``[slots, H, T, D]`` → ``[rows, C]``."""
    q = q[group.first : group.stop]
    q = q.view(group.num_sequences, -1, *q.shape[1:]).transpose(1, 2)
    k = keys[group.slots, :, : group.length]
    v = values[group.slots, :, : group.length]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, is_causal=group.causal)
    return y.transpose(1, 2).flatten(0, 1).flatten(1)
