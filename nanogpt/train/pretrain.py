"""``nanogpt train``: a new model from a configuration and prepared text."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, Final

from nanogpt.errors import SettingsError
from nanogpt.model.config import GPTConfig
from nanogpt.model.gpt import GPT, Dropout
from nanogpt.train import checkpoints
from nanogpt.train.batches import TextBatches
from nanogpt.train.config import TrainConfig
from nanogpt.train.dataset import Dataset, open_dataset
from nanogpt.train.trainer import Result, Task, prepare_torch, train
from nanogpt.train.workers import Workers, join

_GPT2_TOKENS: Final = 50257
_GPT2_PADDED: Final = 50304  # a multiple of 128: matrix products on GPUs are faster


def pretrain(config: TrainConfig, *, resume: bool = False, json_lines: bool = False) -> Result:
    """Trains from random weights, or with ``resume`` from the newest checkpoint of ``out_dir`` where there is one.

    Raises: SettingsError, InvalidRequest, CheckpointError, NanoGPTError.
    """
    dataset = open_dataset(_data_folder(config))
    if dataset.kind != "text":
        raise SettingsError(
            f"{dataset.folder} holds {dataset.kind}, not text.", remedy="nanogpt finetune trains on it.", field="data"
        )
    newest = checkpoints.latest(Path(config.out_dir))
    if not resume:
        checkpoints.refuse_occupied(Path(config.out_dir))
    with join(config.device) as workers:
        prepare_torch(config, workers)
        task = _task(config, dataset, workers)
        return train(task, config, workers, resume=newest, json_lines=json_lines)


def stored(dataset: Dataset) -> dict[str, Any]:
    """What every checkpoint keeps of its data."""
    names = "".join(f"{split} {sha256}\n" for split in dataset.files for sha256 in dataset.files[split].values())
    return {
        "tokenizer": dataset.tokenizer.to_spec(),
        "chat_template": dataset.chat_template,
        "data_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }


def _task(config: TrainConfig, dataset: Dataset, workers: Workers) -> Task:
    model = GPT(model_config(config, dataset.tokenizer.num_tokens), dropout=Dropout(*config.dropouts))
    if workers.first:
        parameters, tokens = model.config.num_parameters(), dataset.num_tokens["train"]
        per_step = config.batch_size * config.accumulation * config.block_size
        note = f"{parameters:,} parameters; {tokens:,} tokens of {dataset.folder}; {per_step:,} tokens a step"
        print(note, file=sys.stderr, flush=True)
    shape: dict[str, Any] = {"block_size": config.block_size, "batch_size": config.batch_size}
    train_batches = TextBatches(
        dataset.open("train"), accumulation=config.accumulation, order=config.order, seed=config.seed, **shape
    )
    validation = (
        TextBatches(dataset.open("val"), order="sequential", **shape) if dataset.num_tokens["val"] > 1 else None
    )
    return Task(model, train_batches, validation, stored(dataset))


def model_config(config: TrainConfig, num_tokens: int) -> GPTConfig:
    """The model that a configuration describes, for a tokenizer.

    Raises: SettingsError, UnsupportedCheckpoint naming what does not fit.
    """
    vocab_size = config.vocab_size or (_GPT2_PADDED if num_tokens == _GPT2_TOKENS else num_tokens)
    if vocab_size < num_tokens:
        raise SettingsError(
            f"vocab_size is {vocab_size}, and the tokenizer has {num_tokens} tokens.",
            remedy="Leave it out: 0 takes the tokenizer's.",
            field="vocab_size",
        )
    return GPTConfig(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        block_size=config.block_size,
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        bias=config.bias,
        activation="gelu_erf" if config.activation == "gelu_erf" else "gelu_tanh",
    )


def _data_folder(config: TrainConfig) -> Path:
    if not config.data:
        raise SettingsError(
            "The configuration names no data.", remedy='Write data = "FOLDER", or --set data=FOLDER.', field="data"
        )
    return Path(config.data)
