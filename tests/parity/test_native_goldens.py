"""The CPU runner against what each family's upstream code computed, in float32, from its own checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nanogpt._kernels")

from nanogpt.checkpoint import load_checkpoint
from nanogpt.runner.base import Float32
from nanogpt.runner.native import NativeRunner

FIXTURES = {
    "01_nanogpt_char/ckpt.pt": "01_nanogpt_char/golden",
    "01b_nanogpt_char_tiny/ckpt.pt": "01b_nanogpt_char_tiny/golden",
    "02_nanogpt_bpe/ckpt.pt": "02_nanogpt_bpe/golden",
    "03_build_nanogpt/log/model_00200.pt": "03_build_nanogpt/golden",
    "04_nano-gpt_fork/log/model_00100.pt": "04_nano-gpt_fork/golden_pretrain",
    "04_nano-gpt_fork/logs_finetune/model_00030.pt": "04_nano-gpt_fork/golden_finetune",
    "05_llmc/gpt2_d2.bin": "05_llmc/golden_fp32",
    "05_llmc/gpt2_d2_bf16.bin": "05_llmc/golden_bf16",
    "06_hf_gpt2/safetensors": "06_hf_gpt2/golden",
}
# How much a perplexity may differ from float32's: the promise for int8; for int4 what these small models bear.
PERPLEXITY = {"fp32": 1e-5, "int8": 1e-3, "int4": 1.5e-2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_CACHE_DIR", str(tmp_path))


def golden(folder: Path, name: str) -> tuple[Any, dict[str, Any]]:
    return np.load(folder / f"{name}.npz"), json.loads((folder / f"{name}.json").read_text())


def mean_loss(runner: NativeRunner, ids: np.ndarray[Any, Any], count: int = 4096) -> float:
    """Nats a token over windows of the context length, as the goldens' protocol says."""
    total = 0.0
    for start in range(0, count, runner.config.block_size):
        n = min(runner.config.block_size, count - start)
        x = runner.logits(ids[start : start + n].astype(np.int32)).astype(np.float64)
        x -= x.max(axis=1, keepdims=True)
        total += float((np.log(np.exp(x).sum(axis=1)) - x[np.arange(n), ids[start + 1 : start + n + 1]]).sum())
    return total / count


@pytest.mark.parametrize("checkpoint", FIXTURES)
def test_fp32_logits_are_upstreams(checkpoint: str, shared_checkpoints: Path) -> None:
    arrays, _ = golden(shared_checkpoints, FIXTURES[checkpoint])
    runner = NativeRunner(load_checkpoint(shared_checkpoints / checkpoint), precision="fp32", num_slots=1)
    for prompt in ("p1", "p2", "p3"):
        expected = arrays[f"logits_{prompt}"]
        found = runner.logits(arrays[f"prompt_{prompt}"])[-1, : len(expected)]
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    runner.close()


@pytest.mark.parametrize("precision", PERPLEXITY)
@pytest.mark.parametrize("checkpoint", FIXTURES)
def test_perplexity_is_float32s(checkpoint: str, precision: str, shared_checkpoints: Path) -> None:
    arrays, facts = golden(shared_checkpoints, FIXTURES[checkpoint])
    runner = NativeRunner(load_checkpoint(shared_checkpoints / checkpoint), precision=precision, num_slots=1)
    loss = mean_loss(runner, arrays["ce_ids"])
    assert abs(np.expm1(loss - facts["cross_entropy"]["mean_nats"])) <= PERPLEXITY[precision]
    runner.close()


@pytest.mark.parametrize("checkpoint", FIXTURES)
def test_int8_greedy_text_differs_only_where_float32_itself_is_unsure(
    checkpoint: str, shared_checkpoints: Path
) -> None:
    """At every place of upstream's own greedy text: where int8 prefers another id, float32's margin between the two is
    smaller than what int8 is off by."""
    arrays, _ = golden(shared_checkpoints, FIXTURES[checkpoint])
    loaded = load_checkpoint(shared_checkpoints / checkpoint)
    exact, runner = (NativeRunner(loaded, precision=p, num_slots=1) for p in ("fp32", "int8"))
    text = np.concatenate([arrays["prompt_p2"], arrays["greedy_p2"]])[: loaded.config.block_size].astype(np.int32)
    first = len(arrays["prompt_p2"]) - 1
    a: Float32 = exact.logits(text)[first:-1, : loaded.config.num_tokens]
    b: Float32 = runner.logits(text)[first:-1, : loaded.config.num_tokens]
    np.testing.assert_array_equal(a.argmax(axis=1), text[first + 1 :])
    rows = np.arange(len(a))
    margin = a[rows, a.argmax(axis=1)] - a[rows, b.argmax(axis=1)]
    error = np.abs(a - b).max(axis=1)
    assert (margin <= 2 * error).all()
    assert (error <= 0.02 * np.abs(a).max()).all()
    for each in (exact, runner):
        each.close()
