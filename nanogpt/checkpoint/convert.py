"""A loaded checkpoint as a folder of another family: Hugging Face, nanoGPT or llm.c.

The folder appears whole or not at all: it is written beside its place and renamed. What a target cannot hold is
refused, and what changes is said. Runs in command line tools.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from nanogpt.checkpoint import canonical, llmc_file, safetensors_file, tokenizer_export, torch_writer
from nanogpt.checkpoint.hugging_face import OURS
from nanogpt.checkpoint.types import Checkpoint, Tensor
from nanogpt.errors import CheckpointError, UnsupportedCheckpoint
from nanogpt.tokenizer.characters import CharacterTokenizer

# Files that a conversion writes, and the int4 plans beside them; a folder with others in it is never replaced.
_OUTPUTS: Final = frozenset(
    {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "characters.json", "ckpt.pt",
     "meta.pkl", "model.bin", "gpt2_tokenizer.bin", "int4.json", "ckpt.pt.int4.json", "model.bin.int4.json"}
)  # fmt: skip


def convert(
    checkpoint: Checkpoint, folder: Path, target: str, *, force: bool = False, change_gelu: bool = False
) -> list[str]:
    """Writes the folder and returns what a user should know of it. ``target``: huggingface, nanogpt or llmc.

    Raises: CheckpointError where the folder is in the way or cannot be written; UnsupportedCheckpoint naming what the
    target cannot hold.
    """
    write = _WRITERS[target]
    _check_place(folder, force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            notes = write(checkpoint, new, change_gelu)
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
    except OSError as error:
        raise CheckpointError(f"Cannot write {folder}: {error.strerror or error}.") from None
    return notes


def _check_place(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a conversion writes a folder.")
    names = sorted(file.name for file in folder.iterdir())
    strangers = [name for name in names if name not in _OUTPUTS]
    if strangers:
        raise CheckpointError(
            f"{folder} holds {', '.join(strangers[:4])}, which no conversion wrote.", remedy="Name an empty folder."
        )
    if names and not force:
        raise CheckpointError(f"{folder} is not empty.", remedy="Give --force to replace what is in it.")


def _to_huggingface(checkpoint: Checkpoint, folder: Path, _: bool) -> list[str]:
    config = checkpoint.config
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        conv1d = canonical.is_conv1d(name)
        tensors[name] = Tensor(tensor.dtype, np.transpose(tensor.raw)) if conv1d else tensor
    notes = []
    if not config.bias:
        for name, shape in replace(config, bias=True).tensor_shapes().items():
            if name not in tensors:
                tensors[name] = Tensor("float32", np.zeros(shape, np.float32))
        notes.append("Hugging Face's GPT-2 has biases: zeros were written for them.")
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_hf_config(checkpoint), indent=2) + "\n", encoding="utf-8")
    tokenizer_export.write_huggingface(
        checkpoint.tokenizer, folder, block_size=config.block_size, chat_template=checkpoint.chat_template
    )
    return notes


def _hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    eos = checkpoint.tokenizer.eos_token_id
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None if config.n_inner == 4 * config.n_embd else config.n_inner,
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "dtype": checkpoint.tensors[canonical.WTE].dtype,
        OURS: {
            "converted_from": checkpoint.family,
            "bias": config.bias,
            "step": checkpoint.step,
            "recorded_loss": checkpoint.recorded_loss,
        },
    }


def _to_nanogpt(checkpoint: Checkpoint, folder: Path, change_gelu: bool) -> list[str]:
    config = checkpoint.config
    notes = _refuse_differences(checkpoint, "nanoGPT", "gelu_erf", change_gelu)
    model, vocab_size = dict(checkpoint.tensors), config.vocab_size
    if isinstance(checkpoint.tokenizer, CharacterTokenizer):  # nanoGPT has no padding for ids without a character
        vocab_size, wte = config.num_tokens, model[canonical.WTE]
        model[canonical.WTE] = Tensor(wte.dtype, wte.raw[:vocab_size])
    model[canonical.HEAD] = model[canonical.WTE]
    training: dict[str, Any] = {}
    if isinstance(checkpoint.tokenizer, CharacterTokenizer):
        tokenizer_export.write_meta(checkpoint.tokenizer, folder / "meta.pkl")
        training["dataset"] = checkpoint.name
        notes.append(f"nanoGPT's sample.py looks for meta.pkl in data/{checkpoint.name}/: copy it there.")
    model_args = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.block_size,
        "bias": config.bias,
        "vocab_size": vocab_size,
        "dropout": 0.0,
    }
    value = {
        "model": model,
        "optimizer": _fresh_adamw(checkpoint),
        "model_args": model_args,
        "iter_num": checkpoint.step or 0,
        "best_val_loss": checkpoint.recorded_loss if checkpoint.recorded_loss is not None else 1e9,
        "config": training,
    }
    torch_writer.write(folder / "ckpt.pt", value)
    return notes


def _fresh_adamw(checkpoint: Checkpoint) -> dict[str, Any]:
    """The state of an AdamW that has not stepped, in nanoGPT's two groups: resuming needs one, and fills it."""
    decayed = sum(len(tensor.shape) >= 2 for tensor in checkpoint.tensors.values())
    common = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "maximize": False, "foreach": None,
              "capturable": False, "differentiable": False, "fused": None}  # fmt: skip
    return {
        "state": {},
        "param_groups": [
            {**common, "weight_decay": 0.1, "params": list(range(decayed))},
            {**common, "weight_decay": 0.0, "params": list(range(decayed, len(checkpoint.tensors)))},
        ],
    }


def _to_llmc(checkpoint: Checkpoint, folder: Path, change_gelu: bool) -> list[str]:
    notes = _refuse_differences(checkpoint, "llm.c", "gelu_tanh", change_gelu)
    if not checkpoint.config.bias:
        notes.append("llm.c's models have biases: zeros were written for them.")
    tokenizer_export.write_llmc(checkpoint.tokenizer, folder / "gpt2_tokenizer.bin")
    llmc_file.write(folder / "model.bin", checkpoint.config, checkpoint.tensors)
    return notes


def _refuse_differences(checkpoint: Checkpoint, target: str, activation: str, change_gelu: bool) -> list[str]:
    """What the target's own code fixes: the caller's model must have the same."""
    config = checkpoint.config
    differences = []
    if not config.tied:
        differences.append("its head is not tied to the embedding")
    if config.n_inner != 4 * config.n_embd:
        differences.append(f"its MLP is {config.n_inner} wide instead of {4 * config.n_embd}")
    if config.layer_norm_eps != 1e-5:
        differences.append(f"its LayerNorm has eps {config.layer_norm_eps:g} instead of 1e-05")
    if differences:
        raise UnsupportedCheckpoint(
            f"{target} cannot hold {checkpoint.name}: {'; '.join(differences)}.",
            remedy="Convert to a Hugging Face folder instead.",
        )
    if config.activation == activation:
        return []
    if not change_gelu:
        raise UnsupportedCheckpoint(
            f"{target} computes {activation}, and {checkpoint.name} was trained with {config.activation}: its outputs"
            " would change a little.",
            remedy="Give --change-gelu to accept that, or convert to a Hugging Face folder.",
        )
    return [f"The GELU changed from {config.activation} to {activation}: the outputs differ a little."]


_WRITERS: Final[dict[str, Callable[[Checkpoint, Path, bool], list[str]]]] = {
    "huggingface": _to_huggingface,
    "nanogpt": _to_nanogpt,
    "llmc": _to_llmc,
}
TARGETS: Final = tuple(_WRITERS)
