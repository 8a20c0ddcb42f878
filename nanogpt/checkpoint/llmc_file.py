"""Reads and writes llm.c's model files: 256 int32 of header, then the tensors by kind, each over all layers.

Version 3 is float32 and version 5 is bfloat16; both store matrices as ``[out, in]``, and the embedding with rows that
pad the vocabulary, which are left out on reading. Does not read llm.c's tokenizer file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from nanogpt.checkpoint.lazy import NUMPY_DTYPE, LazyTensor, Span
from nanogpt.checkpoint.mapped import MappedFile
from nanogpt.checkpoint.safetensors_file import contiguous_bytes
from nanogpt.checkpoint.types import DType, Tensor
from nanogpt.errors import CorruptCheckpoint, UnsupportedCheckpoint
from nanogpt.model.config import GPTConfig

MAGIC: Final = 20240326
TOKENIZER_MAGIC: Final = 20240328
HEADER_BYTES: Final = 1024
MAX_LAYERS: Final = 1024
_DTYPES: Final[dict[int, DType]] = {3: "float32", 5: "bfloat16"}


@dataclass(frozen=True)
class Header:
    version: int
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    padded_vocab_size: int

    def kinds(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The tensors in the file's order; a name with {} is one tensor a layer."""
        c = self.n_embd
        yield "transformer.wte.weight", (self.padded_vocab_size, c)
        yield "transformer.wpe.weight", (self.block_size, c)
        for name, shape in (
            ("ln_1", (c,)),
            ("attn.c_attn", (3 * c, c)),
            ("attn.c_proj", (c, c)),
            ("ln_2", (c,)),
            ("mlp.c_fc", (4 * c, c)),
            ("mlp.c_proj", (c, 4 * c)),
        ):
            yield f"transformer.h.{{}}.{name}.weight", shape
            yield f"transformer.h.{{}}.{name}.bias", shape[:1]
        yield "transformer.ln_f.weight", (c,)
        yield "transformer.ln_f.bias", (c,)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The tensors one by one, in the file's order."""
        for name, shape in self.kinds():
            for layer in range(self.n_layer) if "{}" in name else (0,):
                yield name.format(layer), shape


def looks_like(file: MappedFile) -> bool:
    return int.from_bytes(bytes(file.data[:4]), "little") == MAGIC


def is_tokenizer(file: MappedFile) -> bool:
    return int.from_bytes(bytes(file.data[:4]), "little") == TOKENIZER_MAGIC


def read(file: MappedFile) -> tuple[Header, dict[str, LazyTensor]]:
    """The header and the tensors, the embedding without its padding.

    Raises: CorruptCheckpoint; UnsupportedCheckpoint for another version.
    """
    _, *values = (int(n) for n in np.frombuffer(file.bytes(0, HEADER_BYTES), "<i4")[:8])
    header = Header(*values)
    dtype = _DTYPES.get(header.version)
    if dtype is None:
        raise UnsupportedCheckpoint(
            f"{file.path} is an llm.c model file of version {header.version}; versions 3 (float32) and 5 (bfloat16)"
            " are read.",
            remedy="Write it again with a current llm.c.",
        )
    sizes_fit = all(0 < n < 2**31 for n in values) and header.n_layer <= MAX_LAYERS
    if not sizes_fit or header.vocab_size > header.padded_vocab_size:
        raise CorruptCheckpoint(f"{file.path} is damaged: its header says {header}.", remedy="Copy it again.")
    item = np.dtype(NUMPY_DTYPE[dtype]).itemsize
    tensors: dict[str, LazyTensor] = {}
    offset = HEADER_BYTES
    for name, shape in header.tensors():
        tensors[name] = _tensor(file, dtype, offset, shape)
        offset += math.prod(shape) * item
    if offset != file.size:
        raise CorruptCheckpoint(
            f"{file.path} is damaged: a model of its header's shape has {offset:,} bytes, the file {file.size:,}.",
            remedy="Copy it again.",
        )
    wte = "transformer.wte.weight"
    tensors[wte] = tensors[wte].rows(header.vocab_size)
    return header, tensors


def _tensor(file: MappedFile, dtype: DType, offset: int, shape: tuple[int, ...]) -> LazyTensor:
    count = math.prod(shape)

    def view(_: str) -> Tensor:
        return Tensor(dtype, file.array(NUMPY_DTYPE[dtype], offset, count).reshape(shape))

    return LazyTensor(shape, Span(str(file.path), offset, offset + count), view)


def write(path: Path, config: GPTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes a version 3 file; biases that the model lacks are zeros. The caller says what llm.c cannot hold.

    Raises: OSError.
    """
    padded = -(-config.vocab_size // 128) * 128  # as llm.c pads it
    header = Header(3, config.block_size, config.num_tokens, config.n_layer, config.n_head, config.n_embd, padded)
    head = np.zeros(HEADER_BYTES // 4, "<i4")
    head[:8] = (MAGIC, 3, config.block_size, config.num_tokens, config.n_layer, config.n_head, config.n_embd, padded)
    with path.open("wb") as file:
        file.write(head.tobytes())
        for name, shape in header.tensors():
            values = tensors[name].float32() if name in tensors else np.zeros(shape, np.float32)
            if name == "transformer.wte.weight":
                values = values[: config.num_tokens]
            file.write(contiguous_bytes(values))
            missing = math.prod(shape) - values.size
            if missing:
                file.write(bytes(4 * missing))
        file.flush()
        os.fsync(file.fileno())
