"""Protects the embedded model: it is as good as its card says, in the precision that serves it, and small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanogpt import LLM
from nanogpt.eval.tasks import evaluate_loss

FOLDER = Path(__file__).parents[2] / "nanogpt" / "assets" / "default"
CARD = (FOLDER / "CARD.md").read_text()


@pytest.mark.timeout(300)
def test_its_loss_is_the_one_on_its_card(shared: Path, tmp_path: Path) -> None:
    said = re.search(r"\| Loss \| ([\d.]+) nats.* ([\d.]+) in int8", CARD)
    assert said is not None
    text = (shared / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    val = tmp_path / "val.txt"
    val.write_text(text[int(len(text) * 0.9) :], encoding="utf-8")
    with LLM() as llm:
        result = evaluate_loss(llm, val)
        wanted = float(said[2] if llm.card["precision"] == "int8" else said[1])
    assert result["tokens"] == 111_539
    assert result["loss"] == pytest.approx(wanted, abs=2e-4)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000
