"""What a training run is told: one frozen object, from a TOML file and ``--set key=value``. Unknown keys are refused.

Each field's metadata is the one source for its limits and its line in ``docs/training.md``. Pretraining and fine-tuning
share it; each says which keys it does not know. Knows nothing of PyTorch.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from nanogpt.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_CONFIG_BYTES = 1 << 20


def _key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    only: str = "",
) -> Any:
    """One key. ``only`` names the command that alone knows it."""
    return dataclasses.field(
        default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "only": only}
    )


@dataclass(frozen=True)
class TrainConfig:
    """Every key of a configuration file. Steps count optimizer steps; a micro batch is one forward and backward."""

    # -- where
    data: str = _key("", "Folder that `nanogpt prepare` wrote.", only="train")
    out_dir: str = _key("log", "Folder for checkpoints and logs.")
    checkpoint_interval: int = _key(1000, "A checkpoint every so many steps, and at the end.", low=1, high=10**9)
    keep_last: int = _key(3, "Newest checkpoints that are kept. 0: all.", low=0, high=10**6)
    keep_best: bool = _key(
        False, "Also keep the checkpoint with the lowest validation loss, linked as best_checkpoint.pt."
    )

    # -- the model
    n_layer: int = _key(12, "Layers.", low=1, high=1000, only="train")
    n_head: int = _key(12, "Attention heads of a layer.", low=1, high=1000, only="train")
    n_embd: int = _key(768, "Width; a multiple of n_head.", low=1, high=65536, only="train")
    block_size: int = _key(1024, "Context in tokens; of fine-tuning, at most the model's.", low=1, high=1 << 20)
    vocab_size: int = _key(
        0, "Rows of the embedding. 0: the tokenizer's tokens, GPT-2's padded to 50304.", low=0, high=1 << 24,
        only="train",
    )  # fmt: skip
    bias: bool = _key(True, "Biases in linear layers and LayerNorms, as GPT-2 has them.", only="train")
    activation: str = _key(
        "gelu_tanh", "GELU: the tanh approximation as GPT-2, or exact as nanoGPT.", choices=("gelu_tanh", "gelu_erf"),
        only="train",
    )  # fmt: skip
    dropout: float = _key(0.0, "Dropout; above 0 where the text is read many times.", low=0, high=0.95)
    attention_dropout: bool = _key(
        True, "Dropout of the attention's weights too, as nanoGPT has it. false: twice as fast on a CPU."
    )

    # -- the batches
    batch_size: int = _key(16, "Texts of a micro batch, of one process.", low=1, high=65536)
    accumulation: int = _key(
        1, "Micro batches of a step, over all processes: a multiple of their number.", low=1, high=65536
    )
    order: str = _key(
        "random", "random: windows at random places, as nanoGPT; sequential: one after the other, as build-nanogpt.",
        choices=("random", "sequential"), only="train",
    )  # fmt: skip
    seed: int = _key(1337, "Of weights, batches and dropout.", low=0, high=2**63 - 1)

    # -- the optimizer
    optimizer: str = _key(
        "adamw", "adamw; or muon: Muon for the matrices of the layers, AdamW for the rest.", choices=("adamw", "muon")
    )
    max_steps: int = _key(10_000, "Steps in all.", low=1, high=10**9)
    learning_rate: float = _key(6e-4, "Highest learning rate.", low=0, high=10)
    min_learning_rate: float = _key(6e-5, "Learning rate at the end.", low=0, high=10)
    muon_learning_rate: float = _key(
        0.02, "Highest learning rate of Muon; it follows the same schedule.", low=0, high=10
    )
    schedule: str = _key(
        "cosine", "After warming up: cosine; or wsd (warmup, stable, decay): constant, then linear over decay_steps.",
        choices=("cosine", "wsd", "constant"),
    )  # fmt: skip
    warmup_steps: int = _key(100, "Steps over which the learning rate rises.", low=0, high=10**9)
    decay_steps: int = _key(0, "Last steps of wsd, in which it falls. 0: a fifth of all.", low=0, high=10**9)
    weight_decay: float = _key(0.1, "AdamW's, of matrices and embeddings only.", low=0, high=10)
    beta1: float = _key(0.9, "AdamW's.", low=0, high=0.99999)
    beta2: float = _key(0.95, "AdamW's.", low=0, high=0.999999)
    grad_clip: float = _key(1.0, "Longest gradient. 0: off.", low=0, high=10**6)

    # -- judging
    eval_interval: int = _key(250, "Validation loss every so many steps, and at the end.", low=1, high=10**9)
    eval_batches: int = _key(20, "Micro batches of it, from the beginning of the split. 0: all.", low=0, high=10**9)
    log_interval: int = _key(10, "A line every so many steps.", low=1, high=10**6)

    # -- the machine
    device: str = _key("auto", "auto: cuda where there is one.", choices=("auto", "cpu", "cuda"))
    precision: str = _key(
        "auto", "bf16: matrix products in bfloat16 (autocast); weights stay float32. auto: where the device has it.",
        choices=("auto", "fp32", "bf16"),
    )  # fmt: skip
    compile: bool = _key(False, "torch.compile: slower to start, faster afterwards. Needs a C++ compiler on a CPU.")
    threads: int = _key(0, "Threads on a CPU. 0: as many as the container may use.", low=0, high=1024)
    peak_tflops: float = _key(
        0.0, "The device's peak for MFU, in 10^12 operations a second. 0: known for common GPUs.", low=0, high=10**6
    )
    tensorboard: bool = _key(False, "Also write events for TensorBoard into out_dir.")

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field, getattr(self, field.name))
        if self.min_learning_rate > self.learning_rate:
            raise SettingsError(
                f"min_learning_rate is {self.min_learning_rate:g}, above learning_rate ({self.learning_rate:g}).",
                field="min_learning_rate",
            )
        if self.warmup_steps + (self.decay_steps if self.schedule == "wsd" else 0) > self.max_steps:
            raise SettingsError(
                f"warmup_steps ({self.warmup_steps}) and decay_steps ({self.decay_steps}) are more than max_steps"
                f" ({self.max_steps}).",
                field="warmup_steps",
            )

    @property
    def dropouts(self) -> tuple[float, float]:
        """Of what a layer adds, and of its attention's weights."""
        return self.dropout, self.dropout if self.attention_dropout else 0.0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def keys_of(command: str) -> list[dataclasses.Field[Any]]:
    """The keys that a command knows."""
    return [field for field in fields(TrainConfig) if field.metadata["only"] in ("", command)]


def load_config(
    path: Path | None, assignments: Sequence[str] = (), *, command: str = "train", **defaults: Any
) -> TrainConfig:
    """A run's configuration: ``key=value`` assignments > the TOML file > the command's own defaults > the keys'.

    Raises: SettingsError naming the key, its value and what is admitted.
    """
    values = dict(defaults)
    kinds = get_type_hints(TrainConfig)
    known = [field.name for field in keys_of(command)]
    if path is not None:
        for key, value in _read(path).items():
            _known(key, known, f"in {path}", command)
            values[key] = _from_toml(value, kinds[key], key, path)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise SettingsError(f"--set {assignment!r} is no assignment.", remedy="Write --set key=value.", field="set")
        _known(key, known, "after --set", command)
        values[key] = _from_text(text.strip(), kinds[key], key)
    return TrainConfig(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"Cannot read the configuration {path}: {error.strerror}.", field="config") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise SettingsError(f"{path} has more than {MAX_CONFIG_BYTES:,} bytes: it is no configuration.", field="config")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The configuration {path} is not TOML: {error}.", field="config") from None


def _known(key: str, known: list[str], where: str, command: str) -> None:
    if key in known:
        return
    close = difflib.get_close_matches(key, known, n=1)
    raise SettingsError(
        f"Unknown key {key!r} {where}: nanogpt {command} does not know it.",
        remedy=f"Did you mean {close[0]}?" if close else "docs/training.md lists what there is.",
        field=key,
    )


def _from_toml(value: Any, kind: Any, key: str, path: Path) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise SettingsError(f"{key} in {path} is {value!r}; it must be {_NAMES[kind]}.", field=key)


def _from_text(text: str, kind: Any, key: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        return kind(text)
    except (ValueError, KeyError):
        raise SettingsError(f"--set {key} is {text!r}; it must be {_NAMES[kind]}.", field=key) from None


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    choices, low, high = (field.metadata[name] for name in ("choices", "low", "high"))
    if choices and value not in choices:
        raise SettingsError(f"{field.name} is {value!r}; it must be one of {', '.join(choices)}.", field=field.name)
    if low is not None and not low <= value <= high:  # also refuses NaN
        raise SettingsError(f"{field.name} is {value!r}; it must be between {low:g} and {high:g}.", field=field.name)
