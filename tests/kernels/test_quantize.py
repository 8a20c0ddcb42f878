"""``nanogpt quantize`` measures what it says, refuses a model that int8 or int4 would hurt, and plans int4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nanogpt._kernels")

from checkpoint_files import write_nanogpt

from nanogpt.cli import main

_PREDICTIONS = 512


@pytest.fixture
def checkpoint(shared_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained model in a folder of its own: a plan is written beside it."""
    monkeypatch.setenv("NANOGPT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("ckpt.pt", "meta.pkl"):
        shutil.copyfile(shared_checkpoints / "01b_nanogpt_char_tiny" / name, tmp_path / name)
    return tmp_path / "ckpt.pt"


def quantize(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["quantize", *map(str, arguments), "--tokens", str(_PREDICTIONS), "--threads", "1", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_receipt_names_loss_size_and_sensitive_matrices(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, receipt = quantize(capsys, checkpoint, "--no-plan", "--max-int4-loss", "5")
    assert code == 0
    assert receipt["num_predictions"] == _PREDICTIONS
    assert "Shakespeare" in receipt["text"]
    assert receipt["int4"]["packed_bytes"] < receipt["int8"]["packed_bytes"] < receipt["fp32"]["packed_bytes"]
    assert abs(receipt["int8"]["perplexity_percent"]) < 0.5
    assert receipt["int4"]["margin_percent"] > receipt["int8"]["margin_percent"] > 0
    assert "transformer.wte" in receipt["int4_sensitivity_percent"]
    assert receipt["mixed"]["int8_matrices"] == []
    assert not checkpoint.with_name("ckpt.pt.int4.json").exists()


def test_int8_above_its_limit_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(checkpoint), "--tokens", "64", "--no-sensitivity", "--max-loss", "-5"]
    assert main(["quantize", *arguments]) == 1
    assert "int8 is REFUSED" in capsys.readouterr().out


def test_int4_keeps_to_its_limit_by_matrices_that_stay_in_int8(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mixture was measured, is under the limit and between int8 and int4 in size; the plan names its matrices."""
    code, receipt = quantize(capsys, checkpoint, "--max-int4-loss", "0.25")
    assert code == 0
    mixed = receipt["mixed"]
    assert mixed["perplexity_percent"] <= 0.25 < receipt["int4"]["perplexity_percent"]
    assert receipt["int4"]["packed_bytes"] < mixed["packed_bytes"] < receipt["int8"]["packed_bytes"]
    assert 0 < len(mixed["int8_matrices"]) < mixed["num_matrices"]
    plan = json.loads(Path(receipt["plan"]).read_text())
    assert receipt["plan"] == str(checkpoint) + ".int4.json"
    assert plan["int8"] == mixed["int8_matrices"]
    assert plan["measured"]["max_int4_loss_percent"] == 0.25


def test_a_limit_that_int8_itself_exceeds_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No mixture can do better than int8 everywhere, so none is kept."""
    code, receipt = quantize(capsys, checkpoint, "--max-int4-loss", "-5")
    assert (code, receipt["int4_accepted"], receipt["plan"]) == (1, False, None)
    assert not checkpoint.with_name("ckpt.pt.int4.json").exists()


def test_a_plan_that_could_not_be_kept_is_refused_before_anything_is_measured(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests run as root, whom nothing is forbidden
    assert main(["quantize", str(checkpoint), "--tokens", "64"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert str(checkpoint) in said.err
    assert "--no-plan" in said.err
    assert main(["quantize", str(checkpoint), "--tokens", "64", "--no-plan"]) in (0, 1)


def test_what_was_measured_is_told_where_the_plan_cannot_be_written(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.with_name("ckpt.pt.int4.json").mkdir()
    assert main(["quantize", str(checkpoint), "--tokens", "64", "--max-loss", "9", "--max-int4-loss", "9"]) == 2
    said = capsys.readouterr()
    assert "no plan was written" in said.out
    assert "cannot be kept" in said.err


def test_a_model_that_cannot_read_the_embedded_text_needs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(write_nanogpt(tmp_path / "in"))]) == 2
    assert "--text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "tokens", "said"), [("To be", "512", "17"), ("To be, or not to be: that is", "2", "16")]
)
def test_too_little_to_measure_is_refused(
    text: str, tokens: str, said: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(text)
    assert main(["quantize", str(checkpoint), "--text", str(tmp_path / "text"), "--tokens", tokens]) == 2
    assert said in capsys.readouterr().err
