"""The loss gate's number is the one that ``nanogpt eval --loss`` prints: a limit taken from there means the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanogpt.engine.gates import mean_loss
from nanogpt.eval import tasks
from nanogpt.llm import LLM


def test_the_gate_measures_what_eval_measures(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "val.txt"
    path.write_text((shared / "data" / "tinyshakespeare.txt").read_text()[:3000])
    with LLM(shared / "checkpoints" / "01b_nanogpt_char_tiny", threads=1) as llm:
        measured = mean_loss(llm._runner, llm.tokenizer.encode(path.read_text()))
        assert measured == pytest.approx(tasks.evaluate_loss(llm, path)["loss"], rel=1e-12)
