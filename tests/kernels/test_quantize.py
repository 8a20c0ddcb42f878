"""``nanogpt quantize`` measures what it says, and refuses a model that int8 would hurt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nanogpt._kernels")

from nanogpt.cli import main


def test_the_receipt_names_loss_size_and_sensitive_matrices(
    shared_checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(shared_checkpoints / "01b_nanogpt_char_tiny" / "ckpt.pt")
    text = shared_checkpoints.parent / "data" / "tinyshakespeare.txt"
    assert main(["quantize", checkpoint, "--text", str(text), "--tokens", "512", "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["num_predictions"] == 512
    assert receipt["int4"]["packed_bytes"] < receipt["int8"]["packed_bytes"] < receipt["fp32"]["packed_bytes"]
    assert abs(receipt["int8"]["perplexity_percent"]) < 0.5
    assert "transformer.wte" in receipt["int4_sensitivity_percent"]
    refused = ["quantize", checkpoint, "--text", str(text), "--tokens", "512", "--no-sensitivity", "--max-loss", "1e-9"]
    assert main(refused) == 1
    assert "REFUSED" in capsys.readouterr().out


def test_a_text_that_is_too_short_is_refused(
    shared_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("To be")
    checkpoint = str(shared_checkpoints / "01b_nanogpt_char_tiny" / "ckpt.pt")
    assert main(["quantize", checkpoint, "--text", str(tmp_path / "text")]) == 2
    assert "17" in capsys.readouterr().err
