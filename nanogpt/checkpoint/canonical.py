"""From the names and layouts of a family to ours: nanoGPT's names, ``[out, in]`` matrices, nothing else.

Prefixes of DDP and torch.compile are stripped, causal-mask buffers dropped, the tied head found out. A tensor too many,
one that is missing, a shape that does not fit, a NaN: one error each that names it. Does not know files or families.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import Final

import numpy as np

from nanogpt.checkpoint.lazy import LazyTensor
from nanogpt.checkpoint.mapped import release_pages
from nanogpt.checkpoint.shown import shown
from nanogpt.checkpoint.types import Tensor
from nanogpt.errors import CorruptCheckpoint, UnsupportedCheckpoint
from nanogpt.model.config import GPTConfig

WTE: Final = "transformer.wte.weight"
HEAD: Final = "lm_head.weight"

_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")
_BUFFER = re.compile(r"^transformer\.h\.\d+\.attn\.(?:bias|masked_bias)$")
_CONV1D = re.compile(r"\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_BARE = re.compile(r"^(?:wte|wpe|h\.\d+|ln_f)\.")
_CHUNK_BYTES: Final = 1 << 20
# The exponent of an infinity or a NaN, and all bits but the sign, in an element's own width.
_EXPONENTS: Final[dict[str, tuple[str, int, int]]] = {
    "float64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFFF),
    "float32": ("<u4", 0x7F80_0000, 0x7FFF_FFFF),
    "float16": ("<u2", 0x7C00, 0x7FFF),
    "bfloat16": ("<u2", 0x7F80, 0x7FFF),
}


def is_conv1d(name: str) -> bool:
    """Whether Hugging Face stores this matrix as ``[in, out]``."""
    return _CONV1D.search(name) is not None


def rename(source: Mapping[str, LazyTensor], *, conv1d: bool, where: str) -> dict[str, LazyTensor]:
    """The same tensors under our names, without buffers. ``conv1d``: matrices are stored ``[in, out]``.

    Raises: UnsupportedCheckpoint where two names become one.
    """
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in source.items():
        ours = _PREFIX.sub("", name)
        if _BARE.match(ours):
            ours = "transformer." + ours
        if _BUFFER.match(ours):
            continue
        if ours in renamed:
            raise UnsupportedCheckpoint(f"{where} holds {shown(ours)} twice, once as {shown(name)}.")
        renamed[ours] = tensor.transposed() if conv1d and is_conv1d(ours) else tensor
    return renamed


def is_tied(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the head is the embedding: absent, the same memory, or the same values."""
    if HEAD not in tensors or WTE not in tensors:
        return True
    head, wte = tensors[HEAD], tensors[WTE]
    if head.shape != wte.shape or len(wte.shape) != 2:
        return False
    if head.span == wte.span:
        return True
    a, b = head.open(HEAD), wte.open(WTE)
    if a.dtype != b.dtype:
        return False
    rows = max(1, _CHUNK_BYTES // max(1, a.raw[:1].nbytes))
    for i in range(0, len(a.raw), rows):
        x, y = a.raw[i : i + rows], b.raw[i : i + rows]
        same = np.array_equal(x, y)
        release_pages(x)
        release_pages(y)
        if not same:
            return False
    return True


def has_biases(tensors: Collection[str]) -> bool:
    return "transformer.ln_f.bias" in tensors


def select(tensors: Mapping[str, LazyTensor], config: GPTConfig, where: str) -> dict[str, Tensor]:
    """Exactly the tensors of ``config.tensor_shapes()``, checked.

    Raises: UnsupportedCheckpoint listing tensors that are missing or unknown; CorruptCheckpoint for shapes that do
    not fit, tensors that share memory, wrong checksums, NaN and infinity.
    """
    if 6 * config.n_layer > len(tensors):
        raise UnsupportedCheckpoint(
            f"{where} says that it has {config.n_layer:,} layers, and it holds only {len(tensors):,} tensors."
        )
    shapes = config.tensor_shapes()
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes and not (name == HEAD and config.tied)]
    if missing or unknown:
        raise UnsupportedCheckpoint(
            f"{where} is not a GPT-2 of {config.n_layer} layers with{'' if config.bias else 'out'} biases:"
            + (f" {_list(missing)} missing." if missing else "")
            + (f" {_list(unknown)} not understood." if unknown else ""),
            remedy="A model that was changed beyond GPT-2's architecture cannot be served.",
        )
    wrong = [
        f"{name} is {list(tensors[name].shape)[:8]} instead of {list(shape)}"
        for name, shape in shapes.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise CorruptCheckpoint(f"{where} does not fit its own configuration: {_list(wrong, '')}.")
    _check_overlap({name: tensors[name] for name in shapes}, where)
    selected: dict[str, Tensor] = {}
    for name in shapes:
        selected[name] = tensors[name].open(name)
        tensors[name].verify(name)
    # One after another: two threads would hold two tensors' pages in memory, and win under 0.1 s of GPT-2's 0.5.
    for name in shapes:
        _check_finite(name, selected[name], where)
    return selected


def _check_overlap(tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Two tensors over the same bytes would be a small file that becomes a large model."""
    by_storage: defaultdict[Hashable, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        by_storage[tensor.span.storage].append((tensor.span.start, tensor.span.end, name))
    for ranges in by_storage.values():
        ranges.sort()
        for (_, end, name), (start, _, other) in itertools.pairwise(ranges):
            if start < end:
                raise CorruptCheckpoint(f"{where} is damaged: {name} and {other} lie over each other.")


def _check_finite(name: str, tensor: Tensor, where: str) -> None:
    """In pieces that stay in the processor's cache, as integers: a comparison of floats would be slower."""
    kind, exponent, magnitude = _EXPONENTS[tensor.dtype]
    raw = tensor.raw.T if tensor.raw.flags.f_contiguous else tensor.raw
    bits = (raw if raw.flags.c_contiguous else np.ascontiguousarray(raw)).reshape(-1).view(kind)
    step = _CHUNK_BYTES // bits.itemsize
    for i in range(0, len(bits), step):
        highest = (bits[i : i + step] & magnitude).max()
        release_pages(bits[i : i + step])
        if highest >= exponent:
            raise CorruptCheckpoint(
                f"{where} holds NaN or infinity in {name}: the training diverged, or the file is damaged.",
                remedy="Serve an earlier checkpoint.",
            )


def _list(names: list[str], verb: str = " are", limit: int = 6) -> str:
    text = ", ".join(shown(name, 200) for name in names[:limit])
    text += f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return text + (" is" if verb and len(names) == 1 else verb)
