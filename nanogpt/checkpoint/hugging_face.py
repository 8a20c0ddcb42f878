"""A Hugging Face GPT-2 folder: config.json, safetensors or PyTorch weights, whole or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from nanogpt.checkpoint import canonical, safetensors_file, torch_families
from nanogpt.checkpoint.lazy import LazyTensor
from nanogpt.checkpoint.locate import Found, follow
from nanogpt.checkpoint.mapped import MappedFile
from nanogpt.checkpoint.shown import shown
from nanogpt.checkpoint.source import Source, number, read_sizes, step_number
from nanogpt.checkpoint.stored_zip import is_zip
from nanogpt.checkpoint.torch_file import TorchArchive
from nanogpt.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedCheckpoint
from nanogpt.model.config import Activation

MAX_JSON_BYTES: Final = 8 << 20
MAX_SHARDS: Final = 1_000
# Where a converted checkpoint keeps what GPT-2's config.json has no place for.
OURS: Final = "nano_gpt"

_ACTIVATIONS: Final[dict[str, Activation]] = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
}
# Keys that change the arithmetic, with the only value that is computed here.
_FIXED: Final[dict[str, Any]] = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "quantization_config": None,
}


def read(found: Found) -> Source:
    """The source in a folder.

    Raises: CheckpointNotFound; CorruptCheckpoint; UnsafeCheckpoint; UnsupportedCheckpoint naming what differs.
    """
    assert found.config is not None
    where = str(found.path)
    config = read_json(found.config)
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UnsupportedCheckpoint(
                f"{found.config}: {key} is {shown(config[key])}; only {value!r} is served.",
                remedy="This is another architecture, or a variant of GPT-2 that is not computed here.",
            )
    tensors: dict[str, LazyTensor] = {}
    for file in _weight_files(found.weights):
        for name, tensor in _tensors(file).items():
            if name in tensors:
                raise CorruptCheckpoint(f"{where} holds {shown(name)} in two of its files.")
            tensors[name] = tensor
    torch_families.refuse_other_architecture(tensors, found.path)
    renamed = canonical.rename(tensors, conv1d=True, where=where)
    own = config.get(OURS)
    own = own if isinstance(own, dict) else {}
    bias = True
    notes = [f"Converted from {shown(own['converted_from'])}."] if "converted_from" in own else []
    if own.get("bias") is False:
        renamed = _without_zero_biases(renamed, where)
        bias = False
        notes.append("Biases: none; the zeros that Hugging Face's layout needs were left out.")
    return Source(
        family="huggingface",
        tensors=renamed,
        sizes=read_sizes(config, str(found.config), block_size="n_positions"),
        bias=bias,
        activation=_activation(config, found.config),
        n_inner=config.get("n_inner") or 0,
        layer_norm_eps=_epsilon(config, found.config),
        tied=config.get("tie_word_embeddings", True) is not False,
        step=step_number(own.get("step")),
        recorded_loss=number(own.get("recorded_loss")),
        chat_template=_chat_template(found.path),
        notes=tuple(notes),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: CheckpointNotFound; CorruptCheckpoint.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        value = json.loads(data.decode("utf-8-sig")) if len(data) <= MAX_JSON_BYTES else None
    except OSError as error:
        raise CheckpointNotFound(f"Cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} is not a JSON object of less than {MAX_JSON_BYTES >> 20} MiB.")
    return value


def _weight_files(weights: Path) -> list[Path]:
    """The file itself, or the shards that an index names."""
    if not weights.name.endswith(".index.json"):
        return [weights]
    mapping = read_json(weights).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CorruptCheckpoint(f"{weights} has no weight_map.")
    names = sorted({str(name) for name in mapping.values()})
    if len(names) > MAX_SHARDS or any(Path(name).name != name or name.startswith(".") for name in names):
        raise CorruptCheckpoint(f"{weights} names files outside its folder, or too many.")
    missing = [name for name in names if not (weights.parent / name).is_file()]
    if missing:
        raise CheckpointNotFound(
            f"{weights.parent} lacks {', '.join(map(shown, missing[:4]))}, which {weights.name} names.",
            remedy="Copy it there.",
        )
    return [follow(weights.parent / name) for name in names]


def _tensors(path: Path) -> dict[str, LazyTensor]:
    file = MappedFile(path)
    if safetensors_file.looks_like(file):
        return safetensors_file.read(file)[0]
    if is_zip(file):
        value = TorchArchive(file).read()
        if isinstance(value, dict):
            return torch_families.weights(value, path)
    raise UnsupportedCheckpoint(
        f"{path} is neither safetensors nor what torch.save writes since 2020.",
        remedy="Save the model again with transformers' save_pretrained().",
    )


def _activation(config: dict[str, Any], path: Path) -> Activation:
    name = config.get("activation_function", "gelu_new")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"{path}: activation_function is {shown(name)}; it must be one of {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _epsilon(config: dict[str, Any], path: Path) -> float:
    value = config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(value, float) or not 0 < value < 1:
        raise UnsupportedCheckpoint(f"{path}: layer_norm_epsilon is {shown(value)}; it must lie between 0 and 1.")
    return value


def _without_zero_biases(tensors: dict[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    kept: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(".bias"):
            kept[name] = tensor
        elif tensor.open(name).raw.any():
            raise CorruptCheckpoint(f"{where} says that it has no biases, but {shown(name)} is not zero.")
    return kept


def _chat_template(folder: Path) -> str | None:
    """From tokenizer_config.json, or the file that newer versions of transformers write."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return follow(folder / "chat_template.jinja").read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise CorruptCheckpoint(f"{folder / 'chat_template.jinja'} is not text.") from None
    if (folder / "tokenizer_config.json").is_file():
        template = read_json(follow(folder / "tokenizer_config.json")).get("chat_template")
        return template if isinstance(template, str) else None
    return None
