"""``nanogpt finetune``: a checkpoint of any family, taught to answer instructions.

The model's own tokenizer is used, whatever the data was prepared with is refused if it differs. The template is stored
in every checkpoint, so ``nanogpt chat`` speaks as the model was taught.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import Checkpoint, load_checkpoint
from nanogpt.checkpoint.chat import DOLLY
from nanogpt.errors import InvalidRequest, SettingsError
from nanogpt.model.gpt import GPT, Dropout
from nanogpt.train import checkpoints
from nanogpt.train.batches import InstructionBatches
from nanogpt.train.config import TrainConfig
from nanogpt.train.dataset import open_dataset
from nanogpt.train.instructions import divide, encode, read_examples
from nanogpt.train.shards import INSTRUCTIONS, Shard
from nanogpt.train.trainer import Result, Task, prepare_torch, train
from nanogpt.train.workers import join

# Other than pretraining's: few steps, small ones, and the batch that the guide's project uses.
DEFAULTS: dict[str, Any] = {
    "out_dir": "logs_finetune",
    "max_steps": 500,
    "batch_size": 2,
    "accumulation": 5,
    "learning_rate": 3e-5,
    "min_learning_rate": 3e-6,
    "warmup_steps": 50,
    "weight_decay": 0.01,
    "eval_interval": 50,
    "checkpoint_interval": 100,
}
_VAL_FRACTION = 0.1


def finetune(
    checkpoint: str,
    data: Path,
    config: TrainConfig,
    *,
    tokenizer: str = "",
    resume: bool = False,
    json_lines: bool = False,
) -> Result:
    """Trains on a JSONL file, or on a folder that ``nanogpt prepare jsonl`` wrote.

    Raises: CheckpointError, TokenizerError, InvalidRequest, SettingsError, NanoGPTError.
    """
    base = load_checkpoint(checkpoint, tokenizer=tokenizer)
    newest = checkpoints.latest(Path(config.out_dir))
    if not resume:
        checkpoints.refuse_occupied(Path(config.out_dir))
    train_shards, val_shards = _prepared(data, base) if data.is_dir() else _read(data, base)
    with join(config.device) as workers:
        prepare_torch(config, workers)
        shape: dict[str, Any] = {
            "block_size": min(config.block_size, base.config.block_size),
            "batch_size": config.batch_size,
        }
        batches = InstructionBatches(train_shards, accumulation=config.accumulation, seed=config.seed, **shape)
        task = Task(
            GPT.from_checkpoint(base, dropout=Dropout(*config.dropouts)),
            batches,
            InstructionBatches(val_shards, **shape) if val_shards else None,
            {
                "tokenizer": base.tokenizer.to_spec(),
                "chat_template": DOLLY,
                "data_sha256": _digest([*train_shards, *val_shards]),
            },
        )
        if workers.first:
            epoch = batches.num_examples / (config.batch_size * config.accumulation)
            print(f"{base.path} ({base.family}); {batches.num_examples:,} examples, {epoch:,.1f} steps an epoch",
                  file=sys.stderr, flush=True)  # fmt: skip
        return train(task, config, workers, resume=newest, json_lines=json_lines)


def _read(path: Path, base: Checkpoint) -> tuple[list[Shard], list[Shard]]:
    train_part, val_part = divide(read_examples(path), _VAL_FRACTION)
    return _in_memory(path, train_part, base), _in_memory(path, val_part, base)


def _in_memory(path: Path, examples: list[Any], base: Checkpoint) -> list[Shard]:
    if not examples:
        return []
    tokens = encode(examples, base.tokenizer)
    return [Shard(path, INSTRUCTIONS, hashlib.sha256(tokens.tobytes()).hexdigest(), tokens)]


def _prepared(folder: Path, base: Checkpoint) -> tuple[list[Shard], list[Shard]]:
    dataset = open_dataset(folder)
    if dataset.kind != "instructions":
        raise SettingsError(
            f"{folder} holds {dataset.kind}, not instructions.",
            remedy="nanogpt prepare jsonl makes them.",
            field="data",
        )
    if dataset.tokenizer.to_spec() != base.tokenizer.to_spec():
        raise InvalidRequest(
            f"{folder} was prepared with the tokenizer {dataset.tokenizer.name}, and {base.path} was trained with"
            f" another ({base.tokenizer.name}).",
            remedy="Give the JSONL file itself: it is then tokenized as the model needs it.",
            field="data",
        )
    return dataset.open("train"), dataset.open("val")


def _digest(shards: list[Shard]) -> str:
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
