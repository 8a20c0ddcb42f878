"""Conversions give the same logits in the project that they are made for, and the same weights on the way back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt import LLM, SamplingParams
from nanogpt.checkpoint import load_checkpoint, weights_sha256
from nanogpt.checkpoint.convert import convert

GOLDENS = {
    "01_nanogpt_char": "01_nanogpt_char/golden.npz",
    "02_nanogpt_bpe": "02_nanogpt_bpe/golden.npz",
    "03_build_nanogpt/log": "03_build_nanogpt/golden.npz",
    "04_nano-gpt_fork/logs_finetune": "04_nano-gpt_fork/golden_finetune.npz",
    "05_llmc/gpt2_d2_bf16.bin": "05_llmc/golden_bf16.npz",
    "06_hf_gpt2/prefixless": "06_hf_gpt2/golden.npz",
}
TEXT = "KING:\nWhat is this, thou say'st?"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.parametrize(("source", "golden"), GOLDENS.items(), ids=GOLDENS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_loads_the_folder_to_the_golden_logits(
    source: str, golden: str, shared_checkpoints: Path, tmp_path: Path
) -> None:
    import transformers  # late: it takes seconds

    original = load_checkpoint(shared_checkpoints / source)
    folder = tmp_path / "converted"
    convert(original, folder, "huggingface")
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = np.load(shared_checkpoints / golden)
    with torch.no_grad():
        for prompt in ("p1", "p2", "p3"):
            logits = model(torch.from_numpy(expected[f"prompt_{prompt}"]).long()[None]).logits[0, -1].numpy()
            np.testing.assert_allclose(logits, expected[f"logits_{prompt}"], rtol=1e-4, atol=1e-4)
    with LLM(folder, precision="fp32", runner="torch") as llm:
        (ours,) = llm.generate(TEXT, SamplingParams(temperature=0, max_tokens=24))
    with torch.no_grad():
        prompt = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
        theirs = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]
    assert ours.text == tokenizer.decode(theirs[prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert tokenizer(TEXT).input_ids == original.tokenizer.encode(TEXT)
    assert tokenizer.decode(original.tokenizer.encode(TEXT)) == TEXT

    again = load_checkpoint(folder)
    assert again.config == original.config
    assert weights_sha256(again) == weights_sha256(original)
    assert (again.step, again.recorded_loss) == (original.step, original.recorded_loss)
    assert again.chat_template == original.chat_template
    assert again.tokenizer.encode(TEXT) == original.tokenizer.encode(TEXT)


def test_the_merges_of_gpt2_are_found_again(shared_checkpoints: Path, tmp_path: Path) -> None:
    """tokenizer.json wants the merges, of which tiktoken's ranks know only the results: they are the published ones."""
    import json

    convert(load_checkpoint(shared_checkpoints / "03_build_nanogpt" / "log"), tmp_path / "out", "huggingface")
    ours = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))["model"]
    published = shared_checkpoints / "06_hf_gpt2" / "safetensors"
    merges = (published / "merges.txt").read_text("utf-8").splitlines()[1:]
    assert [" ".join(pair) for pair in ours["merges"]] == merges
    assert ours["vocab"] == json.loads((published / "vocab.json").read_text("utf-8"))


@pytest.mark.parametrize("source", ["01_nanogpt_char", "01b_nanogpt_char_tiny", "02_nanogpt_bpe"])
def test_nanogpt_takes_its_own_checkpoint_back(source: str, shared_checkpoints: Path, tmp_path: Path) -> None:
    """As train.py resumes: weights_only, all keys, an optimizer in two groups that takes the saved state."""
    original = load_checkpoint(shared_checkpoints / source)
    convert(original, tmp_path / "out", "nanogpt")
    loaded = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    upstream = torch.load(original.path, weights_only=True)
    assert loaded["model_args"] == upstream["model_args"] | {"dropout": 0.0}
    assert loaded["iter_num"] == upstream["iter_num"]
    assert float(loaded["best_val_loss"]) == float(upstream["best_val_loss"])
    assert loaded["model"].keys() == upstream["model"].keys()
    for name, tensor in upstream["model"].items():
        assert torch.equal(loaded["model"][name], tensor), name
    model = loaded["model"]
    assert model["lm_head.weight"].data_ptr() == model["transformer.wte.weight"].data_ptr()

    parameters = [torch.nn.Parameter(model[name]) for name in original.tensors]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    optimizer.load_state_dict(loaded["optimizer"])
    sum(p.sum() for p in parameters).backward()
    optimizer.step()

    again = load_checkpoint(tmp_path / "out")
    assert again.config == original.config
    assert weights_sha256(again) == weights_sha256(original)
    assert again.tokenizer.encode("the") == original.tokenizer.encode("the")


def test_torch_maps_our_files_into_memory(shared_checkpoints: Path, tmp_path: Path) -> None:
    convert(load_checkpoint(shared_checkpoints / "02_nanogpt_bpe"), tmp_path / "out", "nanogpt")
    loaded = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True, mmap=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded["model"].values())


def test_llmc_takes_its_own_checkpoint_back(shared_checkpoints: Path, tmp_path: Path) -> None:
    """Byte for byte, but for the rows that pad the vocabulary, which llm.c fills with zeros."""
    path = shared_checkpoints / "05_llmc" / "gpt2_d2.bin"
    original = load_checkpoint(path)
    convert(original, tmp_path / "out", "llmc")
    ours, theirs = (tmp_path / "out" / "model.bin").read_bytes(), path.read_bytes()
    width = original.config.n_embd * 4
    start, end = 1024 + 50257 * width, 1024 + 50304 * width
    assert ours[:start] == theirs[:start]
    assert ours[start:end] == bytes(end - start)
    assert ours[end:] == theirs[end:]
    assert (tmp_path / "out" / "gpt2_tokenizer.bin").read_bytes() == (path.parent / "gpt2_tokenizer.bin").read_bytes()
    assert weights_sha256(load_checkpoint(tmp_path / "out")) == weights_sha256(original)
