"""What ``torch.save`` wrote, told apart by its keys: nanoGPT, build-nanogpt and its fork; others refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from nanogpt.checkpoint import canonical, chat
from nanogpt.checkpoint.lazy import LazyTensor
from nanogpt.checkpoint.pickle_machine import Inert
from nanogpt.checkpoint.shown import shown
from nanogpt.checkpoint.source import Source, number, read_sizes, step_number
from nanogpt.errors import UnsupportedCheckpoint

# The name of a folder, or a path of some: nothing that leaves data/.
_DATASET = re.compile(r"[\w-][\w.-]{0,99}(?:/[\w-][\w.-]{0,99}){0,5}")
# Tensor names that only another architecture has.
_OTHERS: Final = (
    (re.compile(r"^(?:code|optimizers)$|qkvo?_w$"), "modded-nanogpt"),
    (re.compile(r"_lambdas?$|value_embeds|smear_gate|\.attn\.(?:c_q|ve_gate)\.weight"), "nanochat"),
    (re.compile(r"feed_forward\.w[123]\.weight|tok_embeddings\.weight"), "llama2.c"),
    (re.compile(r"self_attn\.q_proj"), "Llama"),
    (re.compile(r"attention\.query_key_value"), "GPT-NeoX"),
    (re.compile(r"attn\.attention\.q_proj"), "GPT-Neo"),
)


def read(value: Any, path: Path) -> Source:
    """The source in the value of a ``.pt``.

    Raises: UnsupportedCheckpoint naming what the file is instead.
    """
    if not isinstance(value, dict):
        raise UnsupportedCheckpoint(
            f"{path} holds a {_kind(value)}, not the dictionary that a training script saves.",
            remedy="Save the model's state_dict() and configuration as nanoGPT or build-nanogpt does.",
        )
    refuse_other_architecture(value, path)
    model = value.get("model", value.get("state_dict"))
    if not isinstance(model, dict):
        raise _no_model(value, path)
    refuse_other_architecture(model, path)
    tensors = canonical.rename(weights(model, path), conv1d=False, where=str(path))
    if isinstance(value.get("config"), dict) and isinstance(value.get("tokenizer"), dict):
        return _ours(value, tensors, path)
    if isinstance(value.get("model_args"), dict):
        return _nanogpt(value, tensors, path)
    if isinstance(value.get("config"), Inert):
        return _build_nanogpt(value, tensors, path)
    raise UnsupportedCheckpoint(
        f"{path} holds weights but neither nanoGPT's model_args nor build-nanogpt's config: the number of heads and the"
        f" GELU cannot be known (it has {_keys(value)}).",
        remedy="Save the configuration with the weights, as nanoGPT's train.py does.",
    )


def weights(model: Mapping[Any, Any], path: Path) -> dict[str, LazyTensor]:
    """The tensors of a state dict.

    Raises: UnsupportedCheckpoint naming an entry that is none.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, LazyTensor):
            raise UnsupportedCheckpoint(f"{path}: the weights hold {shown(name)}, which is a {_kind(tensor)}.")
        tensors[name] = tensor
    return tensors


def refuse_other_architecture(names: Iterable[Any], path: Path) -> None:
    """Raises: UnsupportedCheckpoint with the project's name, where the tensors' names give it away."""
    for name in names:
        for pattern, project in _OTHERS:
            if isinstance(name, str) and pattern.search(name):
                raise UnsupportedCheckpoint(
                    f"{path} is a {project} checkpoint (it has {shown(name)}); its architecture is not GPT-2's and is"
                    " not served by this version.",
                    remedy="nanoGPT, build-nanogpt, llm.c and Hugging Face GPT-2 checkpoints are.",
                )


def _nanogpt(value: Mapping[str, Any], tensors: dict[str, LazyTensor], path: Path) -> Source:
    args = value["model_args"]
    config = value.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    bias = args.get("bias")
    return Source(
        family="nanogpt",
        tensors=tensors,
        sizes=read_sizes(args, f"{path} (model_args)"),
        bias=bias if isinstance(bias, bool) else canonical.has_biases(tensors),
        activation="gelu_erf",
        step=step_number(value.get("iter_num")),
        recorded_loss=number(value.get("best_val_loss")),
        dataset=dataset if isinstance(dataset, str) and _DATASET.fullmatch(dataset) else None,
        notes=("GELU: erf, as nanoGPT computes it (its revisions before mid 2023: tanh).",),
    )


def _build_nanogpt(value: Mapping[str, Any], tensors: dict[str, LazyTensor], path: Path) -> Source:
    config = value["config"]
    source = Source(
        family="build-nanogpt",
        tensors=tensors,
        sizes=read_sizes(config.fields(), f"{path} ({shown(config.name)})"),
        bias=canonical.has_biases(tensors),
        activation="gelu_tanh",
        step=step_number(value.get("step")),
        recorded_loss=number(value.get("val_loss")),
        notes=("GELU: tanh, as build-nanogpt computes it.",),
    )
    # The fork's fine-tuning counts samples; its pretraining, like build-nanogpt's, counts shards and positions.
    loader = value.get("train_loader_state")
    if path.parent.name == "logs_finetune" or (isinstance(loader, dict) and "current_shard" not in loader):
        return _instructed(source)
    return source


def _ours(value: Mapping[str, Any], tensors: dict[str, LazyTensor], path: Path) -> Source:
    """What nanogpt.train writes: everything is said, nothing assumed."""
    config, template = value["config"], value.get("chat_template")
    activation, eps, n_inner = (config.get(name) for name in ("activation", "layer_norm_eps", "n_inner"))
    if activation not in ("gelu_tanh", "gelu_erf") or type(eps) is not float or type(n_inner) is not int:
        raise UnsupportedCheckpoint(
            f"{path} (config) does not say the GELU, the LayerNorm's eps or the MLP's width as this version knows them."
        )
    return Source(
        family="nano-gpt-api",
        tensors=tensors,
        sizes=read_sizes(config, f"{path} (config)"),
        bias=canonical.has_biases(tensors),
        activation=activation,
        n_inner=n_inner,
        layer_norm_eps=eps,
        step=step_number(value.get("step")),
        recorded_loss=number(value.get("val_loss")),
        chat_template=template if isinstance(template, str) else None,
        tokenizer=value["tokenizer"],
    )


def _instructed(source: Source) -> Source:
    return replace(source, chat_template=chat.DOLLY).noting(
        "Fine-tuned on instructions: chat uses the template ### Instruction / ### Context / ### Response."
    )


def _no_model(value: Mapping[Any, Any], path: Path) -> UnsupportedCheckpoint:
    if "param_groups" in value and "state" in value:
        return UnsupportedCheckpoint(f"{path} is the state of an optimizer.", remedy="Name the model's file.")
    if any(isinstance(item, LazyTensor) for item in value.values()):
        return UnsupportedCheckpoint(
            f"{path} holds bare weights; the number of heads and the GELU are not in it.",
            remedy="Put a Hugging Face config.json beside a pytorch_model.bin, or save nanoGPT's model_args with them.",
        )
    return UnsupportedCheckpoint(f"{path} holds no model (it has {_keys(value)}).")


def _keys(value: Mapping[Any, Any]) -> str:
    return ", ".join(shown(key, 40) for key in list(value)[:8]) or "nothing"


def _kind(value: Any) -> str:
    if isinstance(value, Inert):
        return shown(value.name)
    return "tensor" if isinstance(value, LazyTensor) else type(value).__name__
