"""The PyTorch runner, for CPU and CUDA: the layers of ``nanogpt.model.gpt`` over K and V that are kept between steps.

A step's N tokens, of whatever sequences, go through every layer but attention as one matrix ``[N, C]``, attention goes
sequence by sequence; the head is computed for the rows that are sampled, and for no others. On a device most steps are
played by ``nanogpt.runner.step_graphs`` instead, and nothing waits for it before the drawn ids are transferred, once a
step. Used by the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from nanogpt.errors import SettingsError
from nanogpt.model.gpt import GPT, StoredModel
from nanogpt.runner import sampler, sampler_torch
from nanogpt.runner.base import Batch, Float32, Int32, StepOutput
from nanogpt.runner.cpus import usable_cpus
from nanogpt.runner.sampler_torch import upload
from nanogpt.runner.step_graphs import StepGraphs, token_table

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HEAD_MULTIPLE = 64
_HEAD_ROWS = 64
"""Rows whose logits are held at once where many are wanted for their log probabilities (a row of GPT-2's: 200 kB)."""


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
        self._model = GPT.from_checkpoint(checkpoint, device=self._device, dtype=_DTYPES[precision]).eval()
        self._kv = self._allocate()
        self._head = padded_head(self._model) if device != "cpu" else self._model.head
        self._graphs: StepGraphs | None = None
        if device != "cpu":
            # cuDNN's attention plans anew for every length of K: 40 ms for each token of a text. The others do not.
            if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):  # since PyTorch 2.4
                torch.backends.cuda.enable_cudnn_sdp(False)
            self.use_graphs()

    def _allocate(self) -> torch.Tensor:
        """K and V, all zero: stale numbers under a mask do no harm, NaN would. Shapes: ``[L, 2, slots, H, T, D]``.

        One slot more than sequences have: the graphs'.
        """
        c = self.config
        shape = (c.n_layer, 2, self.num_slots + 1, c.n_head, c.block_size, c.head_size)
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
            logits = self._head(picked).float()
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
                logits = self._head(hidden[first : first + len(following)]).float()
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
        del self._model, self._kv, self._graphs, self._head

    @torch.inference_mode()
    def use_graphs(self) -> None:
        """From now on a step that is not too large is one launch."""
        self._graphs = StepGraphs(self._model, self._kv)

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Write the batch's K and V. Returns the hidden states that the head takes. Shapes: ``[N, C]``."""
        graphs = self._graphs
        layers = graphs.step if graphs and len(batch.token_ids) <= graphs.most_tokens else self._layers
        return layers(batch.token_ids, batch.slots, batch.starts, batch.num_tokens)

    def _layers(self, ids: Int32, slots: Int32, starts: Int32, counts: Int32) -> torch.Tensor:
        """Sequences of any number of tokens each. Shapes: ids ``[N]``, the others ``[B]`` → ``[N, C]``."""
        token_ids, slot, _, position = upload(token_table(ids, slots, starts, counts), self._device)
        firsts = np.cumsum(counts) - counts
        parts = [
            _Part(first, n, slot, start + n, self._device)
            for first, n, slot, start in np.stack([firsts, counts, slots, starts], axis=1).tolist()
        ]
        transformer = self._model.transformer
        x = transformer.wte(token_ids) + transformer.wpe(position)
        for block, (keys, values) in zip(transformer.blocks, self._kv, strict=True):
            q, k, v = block.attn.project(block.ln_1(x))
            keys[slot, :, position] = k
            values[slot, :, position] = v
            y = torch.cat([part.attend(q, keys, values) for part in parts])
            x = x + block.attn.c_proj(y)
            x = x + block.mlp(block.ln_2(x))
        hidden: torch.Tensor = transformer.ln_f(x)
        return hidden


def _device_precision() -> str:
    # From Ampere on. torch.cuda.is_bf16_supported is true also where the device only emulates it.
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def padded_head(model: GPT) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's head with as many rows as a device multiplies fast: GPT-2's 50,257 take three times 50,304's time."""
    weight = model.transformer.wte.weight if model.lm_head is None else model.lm_head.weight
    num_rows = len(weight)
    padded = F.pad(weight.detach(), (0, 0, 0, -num_rows % _HEAD_MULTIPLE))
    weight.data = padded[:num_rows]  # one copy in memory
    return lambda x: F.linear(x, padded)[:, :num_rows]


class _Part:
    """One sequence's attention: rows ``first .. first + n`` of the step, over K and V that are read where they lie."""

    def __init__(self, first: int, n: int, slot: int, length: int, device: torch.device) -> None:
        self._rows = slice(first, first + n)
        self._slot = slot
        self._length = length
        # Where nothing came before, PyTorch's own causal mask is the faster one.
        self._causal = n > 1 and n == length
        self._mask = None
        if 1 < n < length:
            self._mask = torch.ones(n, length, dtype=torch.bool, device=device).tril(length - n)

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Shapes: q ``[N, H, D]``, keys and values ``[slots, H, T, D]`` → ``[n, C]``."""
        k, v = keys[self._slot, :, : self._length], values[self._slot, :, : self._length]
        q = q[self._rows].transpose(0, 1)
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=self._mask, is_causal=self._causal)
        return y[0].transpose(0, 1).flatten(1)
