"""Protects a run from a typing mistake: what is not known is refused by name, and every key is explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support import ROOT

from nanogpt.errors import SettingsError
from nanogpt.train.config import TrainConfig, load_config

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_of_the_project_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.n_embd % config.n_head == 0


def test_all_four_recipes_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= {"shakespeare-char", "shakespeare-char-cpu", "gpt2-124m", "demo"}


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_key_is_documented(field: dataclasses.Field[object]) -> None:
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    row = next((line for line in page.splitlines() if line.startswith(f"| `{field.name}` |")), None)
    assert row, f"docs/training.md has no row for {field.name}"
    assert field.metadata["help"] in row


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat = 1e-3", ["learning_rat", "learning_rate"]),
        ("[model]\nn_layer = 2", ["model"]),
        ("n_layer = 2.5", ["n_layer", "2.5", "integer"]),
        ("n_layer = true", ["n_layer", "integer"]),
        ("compile = 1", ["compile", "true or false"]),
        ("dropout = nan", ["dropout", "between"]),
        ("batch_size = 0", ["batch_size", "0", "1"]),
        ('schedule = "linear"', ["schedule", "linear", "cosine", "wsd"]),
        ("min_learning_rate = 1.0", ["min_learning_rate", "learning_rate"]),
        ("warmup_steps = 20000", ["warmup_steps", "max_steps"]),
        ("n_layer = ", ["not TOML"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_config(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_assignments_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "n_layer = 3\nlearning_rate = 1\nmin_learning_rate = 0")
    config = load_config(path, ["n_layer=4", "max_steps=1_000", "compile=true", "out_dir=a=b"])
    assert (config.n_layer, config.max_steps, config.compile, config.out_dir) == (4, 1000, True, "a=b")
    assert config.learning_rate == 1.0


@pytest.mark.parametrize("assignment", ["n_layer", "n_layer=x", "n_layers=2", "compile=1"])
def test_a_wrong_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(SettingsError, match=assignment.partition("=")[0]):
        load_config(None, [assignment])


def test_fine_tuning_takes_the_model_from_the_checkpoint() -> None:
    with pytest.raises(SettingsError, match="finetune does not know"):
        load_config(None, ["n_layer=2"], command="finetune")
