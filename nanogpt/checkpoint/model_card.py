"""The card: what a checkpoint is, as plain JSON values. Sent to HTTP workers, printed by ``nanogpt inspect``.

The digest is separate, because it reads every byte of the weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, Final

import numpy as np

from nanogpt.checkpoint.mapped import release_pages
from nanogpt.checkpoint.types import Checkpoint, Tensor

# float32 elements that are converted and hashed at a time.
_CHUNK: Final = 1 << 20


def card(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that is known of the checkpoint without reading its weights again."""
    config = checkpoint.config
    tensors = checkpoint.tensors.values()
    return {
        "name": checkpoint.name,
        "family": checkpoint.family,
        "path": str(checkpoint.path),
        "file_bytes": file_bytes(checkpoint),
        "step": checkpoint.step,
        "recorded_loss": checkpoint.recorded_loss,
        "parameters": config.num_parameters(),
        "weights_bytes": sum(tensor.num_bytes for tensor in tensors),
        "dtype": " + ".join(sorted(Counter(tensor.dtype for tensor in tensors))),
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "block_size": config.block_size,
        "vocab_size": config.vocab_size,
        "num_tokens": config.num_tokens,
        "bias": config.bias,
        "activation": config.activation,
        "tied": config.tied,
        "layer_norm_eps": config.layer_norm_eps,
        "tokenizer": checkpoint.tokenizer.name,
        "chat_template": checkpoint.chat_template,
        "notes": list(checkpoint.notes),
    }


def file_bytes(checkpoint: Checkpoint) -> int:
    """Size of the file, or of all files of the model's folder."""
    path = checkpoint.path
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def weights_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of the weights, the same for the same weights in whatever file format.

    Hashed: for each tensor of ``config.tensor_shapes()``, in the order of the names, the line
    ``<name> <dimension>x<dimension>\\n`` in UTF-8, then its elements as little-endian float32 in C order.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        digest.update(f"{name} {'x'.join(map(str, tensor.shape))}\n".encode())
        rows = max(1, _CHUNK // max(1, tensor.raw[:1].size))
        for i in range(0, len(tensor.raw), rows):
            piece = Tensor(tensor.dtype, tensor.raw[i : i + rows]).float32()
            digest.update(piece.astype("<f4", copy=False).reshape(-1).view(np.uint8).data)
            release_pages(tensor.raw[i : i + rows])
    return digest.hexdigest()
