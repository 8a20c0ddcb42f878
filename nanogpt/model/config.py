"""The shape of a GPT-2 family model. Knows nothing of PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nanogpt.errors import UnsupportedCheckpoint

Activation = Literal["gelu_tanh", "gelu_erf"]


@dataclass(frozen=True)
class GPTConfig:
    """GPT-2's names, as nanoGPT, build-nanogpt and llm.c use them.

    ``vocab_size`` counts the rows of the embedding table (V in logits' shape). ``num_tokens`` counts the ids
    that the tokenizer knows: ids from ``num_tokens`` to ``vocab_size`` are padding and are never sampled.
    ``n_inner`` is the width of the MLP (4 * n_embd in every nano project).
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    num_tokens: int
    bias: bool = True
    activation: Activation = "gelu_tanh"
    tied: bool = True
    n_inner: int = 0
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.n_inner == 0:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "num_tokens", "n_inner"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise UnsupportedCheckpoint(f"The model's {name} is {value!r}; it must be a positive integer.")
        if self.n_embd % self.n_head:
            raise UnsupportedCheckpoint(
                f"The model's n_embd ({self.n_embd}) is not a multiple of its n_head ({self.n_head})."
            )
        if self.num_tokens > self.vocab_size:
            raise UnsupportedCheckpoint(
                f"The tokenizer knows {self.num_tokens} ids but the model has only {self.vocab_size} rows for them."
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical tensors of such a model: nanoGPT's names, ``[out, in]`` matrices.

        Shapes: wte ``[V, C]``, wpe ``[T, C]``, c_attn ``[3C, C]`` (q, k, v), c_fc ``[n_inner, C]``.
        ``lm_head.weight`` is listed only when it is not tied to ``transformer.wte.weight``.
        """
        c, f = self.n_embd, self.n_inner
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.vocab_size, c),
            "transformer.wpe.weight": (self.block_size, c),
        }
        for i in range(self.n_layer):
            block = f"transformer.h.{i}."
            for name, shape in (
                ("ln_1", (c,)),
                ("attn.c_attn", (3 * c, c)),
                ("attn.c_proj", (c, c)),
                ("ln_2", (c,)),
                ("mlp.c_fc", (f, c)),
                ("mlp.c_proj", (c, f)),
            ):
                shapes[f"{block}{name}.weight"] = shape
                if self.bias:
                    shapes[f"{block}{name}.bias"] = shape[:1]
        shapes["transformer.ln_f.weight"] = (c,)
        if self.bias:
            shapes["transformer.ln_f.bias"] = (c,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, c)
        return shapes

    def num_parameters(self) -> int:
        """Number of weights, the tied head counted once."""
        total = 0
        for shape in self.tensor_shapes().values():
            size = 1
            for n in shape:
                size *= n
            total += size
        return total

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
