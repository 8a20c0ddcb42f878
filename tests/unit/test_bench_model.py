"""`nanogpt bench model`: its arithmetic of bytes, and that it runs with every runner that is there."""

from __future__ import annotations

import json

import pytest

from nanogpt import cli
from nanogpt.bench import model
from nanogpt.model.config import GPTConfig

Capture = pytest.CaptureFixture[str]


def test_a_step_reads_the_matrices_once() -> None:
    """GPT-2: 124 million parameters, of which the position embedding and the vectors are no part of it."""
    gpt2 = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, num_tokens=50257)
    weights = 12 * 12 * 768 * 768 + 50257 * 768
    assert model.weight_bytes(gpt2, "int8") == weights
    assert model.weight_bytes(gpt2, "fp32") == 4 * weights
    assert model.weight_bytes(gpt2, "int4") < 0.54 * weights


def test_reading_is_measured_for_buffers_of_every_size() -> None:
    assert model.read_speed(1000, 1) > 1e8
    assert model.read_speed(3 << 20, 2) > 1e8


@pytest.mark.parametrize("runner", ["native", "torch"])
def test_the_embedded_model_is_measured(runner: str, capsys: Capture) -> None:
    if runner == "native":
        pytest.importorskip("nanogpt._kernels")
    words = ["bench", "model", "--runner", runner, "--batches", "1,3", "--seconds", "0.02", "--threads", "1"]
    assert cli.main([*words, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in report["rows"]] == [1, 3]
    assert report["runner"] == runner
    for row in report["rows"]:
        assert row["decode_tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["decode_step_ms"], rel=0.01)
        assert row["share_of_read_speed"] == pytest.approx(row["bytes_per_s"] / report["read_bytes_per_s"], abs=1e-3)
        assert row["step_bytes"] > report["weight_bytes"]


def test_texts_begin_anew_where_the_context_ends(capsys: Capture) -> None:
    """More steps than the context has room for: each is computed at a position that exists."""
    words = ["bench", "model", "--batches", "1", "--prompt-tokens", "250", "--seconds", "0.1", "--threads", "1"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "prompts of 250 tokens" in out
    assert "memory:" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--batches", "0"], "--batches"), (["--batches", "1,x"], "--batches"), (["--seconds", "0"], "--seconds"),
     (["--prompt-tokens", "-1"], "--prompt-tokens"), (["--prompt-tokens", "9999"], "context of 256"),
     (["/nowhere/model.pt"], "/nowhere/model.pt")],
)  # fmt: skip
def test_what_cannot_be_measured_is_told(words: list[str], said: str, capsys: Capture) -> None:
    assert cli.main(["bench", "model", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["http://x", "--rate", "1", "--concurrency", "1"], "not both"), (["x"], "The URL"),
     (["http://x", "--find-capacity"], "needs --slo"), (["http://x", "--rate", "0"], "--rate is 0"),
     (["http://x", "--rate", "nan"], "--rate is nan"), (["http://x", "--slo", "fast"], "ttft=200ms"),
     (["http://x", "--find-capacity", "--slo", "ttft=1s", "--rate", "2"], "leave --rate away"),
     (["http://x", "--body", "[1]"], "--body"), (["http://x", "--shared-prefix", "64"], "--shared-prefix")],
)  # fmt: skip
def test_a_load_that_cannot_be_sent_is_refused_before_anything_is(words: list[str], said: str, capsys: Capture) -> None:
    assert cli.main(["bench", "serve", *words]) == 2
    assert said in capsys.readouterr().err
