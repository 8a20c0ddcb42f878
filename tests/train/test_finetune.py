"""Protects fine-tuning: any checkpoint can begin it, answers alone are learned, chat speaks as the model was taught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.checkpoint import load_checkpoint
from nanogpt.checkpoint.chat import DOLLY
from nanogpt.cli.chat import Conversation
from nanogpt.errors import InvalidRequest
from nanogpt.llm import LLM
from nanogpt.sampling_params import SamplingParams
from nanogpt.train.config import TrainConfig, load_config
from nanogpt.train.finetune import DEFAULTS, finetune
from nanogpt.train.prepare import prepare_text
from nanogpt.train.pretrain import pretrain

PAIRS = {"the colour of snow": "white", "the colour of coal": "black", "the colour of grass": "green"}


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jsonl") / "colours.jsonl"
    lines = [{"instruction": question, "context": "", "response": answer} for question, answer in PAIRS.items()]
    path.write_text("\n".join(map(json.dumps, lines * 4)) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours with a BPE of its own."""
    folder = tmp_path_factory.mktemp("base")
    text = "".join(f"### Instruction:\n{q}\n\n### Response:\n{a}\n" for q, a in PAIRS.items()) * 30
    (folder / "text.txt").write_text(text, "utf-8")
    prepare_text([folder / "text.txt"], folder / "data", tokenizer="bpe", vocab_size=300, val_fraction=0.1,
                 shard_tokens=10_000)  # fmt: skip
    pretrain(
        TrainConfig(
            data=str(folder / "data"), out_dir=str(folder / "log"), n_layer=1, n_head=2, n_embd=32, block_size=64,
            batch_size=4, max_steps=5, warmup_steps=1, eval_batches=1, threads=1, device="cpu",
        )
    )  # fmt: skip
    return folder / "log"


def config(folder: Path, **changes: Any) -> TrainConfig:
    values = {"out_dir": folder, "threads": 1, "device": "cpu", "batch_size": 4, "accumulation": 1, "warmup_steps": 1,
              **changes}  # fmt: skip
    return load_config(None, [f"{key}={value}" for key, value in values.items()], command="finetune", **DEFAULTS)


def test_it_answers_as_it_was_taught(base: Path, instructions: Path, tmp_path: Path) -> None:
    out = tmp_path / "logs_finetune"
    finetune(
        str(base), instructions, config(out, max_steps=80, learning_rate=1e-2, min_learning_rate=1e-3, eval_interval=80)
    )
    checkpoint = load_checkpoint(out)
    assert checkpoint.chat_template == DOLLY
    with LLM(out, threads=1, runner="torch") as llm:
        conversation = Conversation(llm, SamplingParams(temperature=0.0, max_tokens=8))
        for question, answer in PAIRS.items():
            assert "".join(conversation.answer(question)) == answer, "and it ends there, by the end-of-text token"
            conversation.messages.clear()


def test_prompts_do_not_count(base: Path, tmp_path: Path) -> None:
    """Two data sets with other questions of the same length, the same answers: their losses differ only by what the
    model reads, and a run that counted prompts would learn them."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"instruction": "zebra zebra", "response": "yes"}) + "\n", "utf-8")
    out = tmp_path / "out"
    finetune(str(base), path, config(out, max_steps=60, learning_rate=1e-2, min_learning_rate=1e-3))
    with LLM(out, threads=1, runner="torch") as llm:
        prompt = "### Instruction:\n"
        (completion,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=4))
        assert "zebra" not in completion.text
        full = "### Instruction:\nzebra zebra\n\n### Response:\n"
        (completion,) = llm.generate([full], SamplingParams(temperature=0.0, max_tokens=4))
        assert completion.text == "yes"


def test_it_resumes_bitwise(base: Path, instructions: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 8, "checkpoint_interval": 4, "eval_interval": 4, "dropout": 0.1, "accumulation": 2}
    finetune(str(base), instructions, config(tmp_path / "a", **changes))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model_00004.pt").write_bytes((tmp_path / "a" / "model_00004.pt").read_bytes())
    finetune(str(base), instructions, config(tmp_path / "b", **changes), resume=True)
    a, b = (torch.load(tmp_path / name / "model_00008.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


@pytest.mark.parametrize(
    "name", ["03_build_nanogpt/log", "05_llmc/gpt2_d2.bin", "06_hf_gpt2/safetensors", "02_nanogpt_bpe/ckpt.pt"]
)
def test_any_familys_checkpoint_can_begin_it(
    shared_checkpoints: Path, instructions: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    before = load_checkpoint(shared_checkpoints / name)
    finetune(str(shared_checkpoints / name), instructions, config(out, max_steps=1, eval_batches=1))
    after = load_checkpoint(out)
    assert after.config == before.config
    assert after.tokenizer.to_spec() == before.tokenizer.to_spec()
    assert (after.step, after.chat_template) == (1, DOLLY)


def test_a_model_without_an_end_of_text_is_refused(
    shared_checkpoints: Path, instructions: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="no end-of-text token"):
        finetune(str(shared_checkpoints / "01b_nanogpt_char_tiny"), instructions, config(tmp_path / "out"))


def test_data_of_another_tokenizer_is_refused(
    base: Path, instructions: Path, tmp_path: Path, nanogpt: Callable[..., Any]
) -> None:
    made = nanogpt("prepare", "jsonl", instructions, "--out", tmp_path / "data")
    assert made.returncode == 0, made.stderr
    assert "12 examples" in made.stdout
    with pytest.raises(InvalidRequest, match="prepared with the tokenizer gpt2"):
        finetune(str(base), tmp_path / "data", config(tmp_path / "out"))
