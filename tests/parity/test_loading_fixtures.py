"""Every real checkpoint gives the tensors that its own project's loader gives."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nanogpt.checkpoint import card, load_checkpoint, weights_sha256
from nanogpt.checkpoint.types import Checkpoint
from nanogpt.errors import CheckpointNotFound, UnsupportedCheckpoint

FILES = {
    "nanoGPT characters": ("01_nanogpt_char/ckpt.pt", "golden.json"),
    "nanoGPT characters, tiny": ("01b_nanogpt_char_tiny/ckpt.pt", "golden.json"),
    "nanoGPT BPE": ("02_nanogpt_bpe/ckpt.pt", "golden.json"),
    "nanoGPT BPE, compiled": ("02_nanogpt_bpe/ckpt_orig_mod.pt", None),
    "build-nanogpt": ("03_build_nanogpt/log/model_00200.pt", "../golden.json"),
    "the guide's fork": ("04_nano-gpt_fork/log/model_00100.pt", "../golden_pretrain.json"),
    "the guide's fork, fine-tuned": ("04_nano-gpt_fork/logs_finetune/model_00030.pt", "../golden_finetune.json"),
    "Hugging Face .bin": ("06_hf_gpt2/bin/pytorch_model.bin", "../golden.json"),
}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class GPTConfig:
    """Where torch.load puts the pickled configurations."""


@pytest.fixture
def upstream_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that the upstream projects' pickles name, so that torch.load can be compared with."""
    for name in ("model", "model.train_gpt2", "train_gpt2"):
        module = types.ModuleType(name)
        module.GPTConfig = GPTConfig  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)


def state_dict(path: Path) -> dict[str, Any]:
    """What torch.load gives, under the names and in the layout of nanoGPT."""
    loaded = torch.load(path, map_location="cpu", weights_only=False)
    result = {}
    for name, value in loaded.get("model", loaded).items():
        name = name.removeprefix("_orig_mod.")
        if path.name == "pytorch_model.bin" and name.endswith(CONV1D):
            value = value.T
        result[name] = value
    return result


@pytest.mark.parametrize(("file", "golden"), FILES.values(), ids=FILES)
@pytest.mark.usefixtures("upstream_modules")
def test_tensors_are_those_of_torch_load(file: str, golden: str | None, shared_checkpoints: Path) -> None:
    path = shared_checkpoints / file
    checkpoint = load_checkpoint(path)
    expected = state_dict(path)
    unused = expected.keys() - checkpoint.tensors.keys()
    assert unused <= {"lm_head.weight"}
    assert checkpoint.tensors.keys() == checkpoint.config.tensor_shapes().keys()
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.float32(), expected[name].numpy(), err_msg=name)
    if golden is not None:
        check_against_golden(checkpoint, json.loads((path.parent / golden).read_text()))


def check_against_golden(checkpoint: Checkpoint, golden: dict[str, Any]) -> None:
    """What the project's own code said of the file when the goldens were made."""
    config = golden.get("model_args", golden.get("config"))
    for theirs, ours in {"n_positions": "block_size"}.items():
        if theirs in config:
            config[ours] = config[theirs]
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias"):
        assert getattr(checkpoint.config, key) == config.get(key, True), key
    if "step" in golden or "iter_num" in golden:
        assert checkpoint.step == golden.get("step", golden.get("iter_num"))
        assert checkpoint.recorded_loss == pytest.approx(golden.get("val_loss", golden.get("best_val_loss")), rel=1e-12)
    for prompt in golden["prompts"].values():
        assert checkpoint.tokenizer.decode(prompt["ids"]) == prompt["text"]


def test_the_compiled_checkpoint_has_the_same_weights(shared_checkpoints: Path) -> None:
    folder = shared_checkpoints / "02_nanogpt_bpe"
    digests = {weights_sha256(load_checkpoint(folder / name)) for name in ("ckpt.pt", "ckpt_orig_mod.pt")}
    assert len(digests) == 1


def test_the_three_hugging_face_layouts_are_one_model(shared_checkpoints: Path) -> None:
    folder = shared_checkpoints / "06_hf_gpt2"
    checkpoints = [load_checkpoint(folder / name) for name in ("safetensors", "bin", "prefixless")]
    assert len({weights_sha256(checkpoint) for checkpoint in checkpoints}) == 1
    assert len({checkpoint.config for checkpoint in checkpoints}) == 1
    text = "Speak, good Café 你好!"
    assert len({tuple(checkpoint.tokenizer.encode(text)) for checkpoint in checkpoints}) == 1


def test_safetensors_are_read_as_their_own_library_reads_them(shared_checkpoints: Path) -> None:
    folder = shared_checkpoints / "06_hf_gpt2" / "safetensors"
    expected = load_file(folder / "model.safetensors")
    for name, tensor in load_checkpoint(folder).tensors.items():
        value = expected[name].T if name.endswith(CONV1D) else expected[name]
        np.testing.assert_array_equal(tensor.float32(), value, err_msg=name)


@pytest.mark.parametrize(("file", "dtype"), [("gpt2_d2.bin", "float32"), ("gpt2_d2_bf16.bin", "bfloat16")])
def test_llmc_files_are_read_as_llmc_reads_them(file: str, dtype: str, shared_checkpoints: Path) -> None:
    """llm.c's gpt2_build_from_checkpoint: sixteen arrays, one behind the other."""
    path = shared_checkpoints / "05_llmc" / file
    header = np.fromfile(path, "<i4", 8)
    _, _, max_t, v, n, _, c, vp = (int(x) for x in header)
    raw = np.fromfile(path, "<f4" if dtype == "float32" else "<u2", offset=1024)
    values = raw if dtype == "float32" else (raw.astype("<u4") << 16).view("<f4")
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    shapes: list[tuple[int, ...]] = [(vp, c), (max_t, c)]
    for name, shape in (
        ("ln_1", (c,)),
        ("attn.c_attn", (3 * c, c)),
        ("attn.c_proj", (c, c)),
        ("ln_2", (c,)),
        ("mlp.c_fc", (4 * c, c)),
        ("mlp.c_proj", (c, 4 * c)),
    ):
        names += [name + ".weight", name + ".bias"]
        shapes += [(n, *shape), (n, shape[0])]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    shapes += [(c,), (c,)]
    checkpoint = load_checkpoint(path)
    at = 0
    for name, shape in zip(names, shapes, strict=True):
        array = values[at : at + int(np.prod(shape))].reshape(shape)
        at += array.size
        per_layer = {f"transformer.h.{i}.{name}": array[i] for i in range(n)}
        for key, expected in ({name: array} if name.startswith("transformer") else per_layer).items():
            tensor = checkpoint.tensors[key]
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(tensor.float32(), expected[:v] if "wte" in key else expected, err_msg=key)
    assert at == values.size
    assert (checkpoint.config.vocab_size, checkpoint.config.activation) == (v, "gelu_tanh")


def test_folders_and_flattened_links(shared_checkpoints: Path) -> None:
    fork = shared_checkpoints / "04_nano-gpt_fork"
    assert load_checkpoint(fork / "log").name == "model_00100"
    assert load_checkpoint(fork / "log" / "latest_checkpoint.pt").name == "model_00100"
    assert load_checkpoint(fork / "logs_finetune").name == "model_00030"
    assert load_checkpoint(shared_checkpoints / "01_nanogpt_char").name == "01_nanogpt_char"
    with pytest.raises(CheckpointNotFound, match=r"gpt2_d2\.bin, gpt2_d2_bf16\.bin"):
        load_checkpoint(shared_checkpoints / "05_llmc")


def test_only_the_fine_tuned_checkpoint_expects_instructions(shared_checkpoints: Path, tmp_path: Path) -> None:
    """Known by its folder, and by its loader's state wherever the file was copied to."""
    fork = shared_checkpoints / "04_nano-gpt_fork"
    assert load_checkpoint(fork / "log").chat_template is None
    assert load_checkpoint(shared_checkpoints / "03_build_nanogpt" / "log").chat_template is None
    template = load_checkpoint(fork / "logs_finetune").chat_template
    assert template is not None
    copied = tmp_path / "mine.pt"
    copied.write_bytes((fork / "logs_finetune" / "model_00030.pt").read_bytes())
    assert load_checkpoint(copied).chat_template == template


@pytest.mark.parametrize(
    "file", ["base_checkpoints/d4", "base_checkpoints/d4/model_000300.pt", "chatsft_checkpoints/d4/model_000059.pt"]
)
def test_nanochat_is_refused_by_name(file: str, shared_checkpoints: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="nanochat"):
        load_checkpoint(shared_checkpoints / "07_nanochat" / file)


def test_other_files_of_nanochat_are_refused(shared_checkpoints: Path) -> None:
    folder = shared_checkpoints / "07_nanochat"
    for file, words in (
        ("base_checkpoints/d4/optim_000300_rank0.pt", "optimizer"),
        ("tokenizer/tokenizer.pkl", "bare pickle"),
        ("tokenizer/token_bytes.pt", "holds a tensor"),
    ):
        with pytest.raises(UnsupportedCheckpoint, match=words):
            load_checkpoint(folder / file)


def test_the_card_says_what_was_not_read(shared_checkpoints: Path) -> None:
    """Rule 3: nothing is guessed silently."""
    described = card(load_checkpoint(shared_checkpoints / "03_build_nanogpt" / "log"))
    json.dumps(described)
    assert described["parameters"] == 1_639_296
    assert (described["num_tokens"], described["vocab_size"]) == (50257, 50304)
    notes = " ".join(described["notes"])
    assert "GELU: tanh" in notes
    assert "Tokenizer: gpt2, assumed" in notes
    assert "padded from 50,257 to 50,304" in notes


def test_the_embedded_model_is_the_one_on_its_card() -> None:
    embedded = load_checkpoint()
    text = (embedded.path / "CARD.md").read_text()
    assert weights_sha256(embedded) in text
    assert f"{embedded.config.num_parameters():,} parameters" in text
    assert f"context {embedded.config.block_size}" in text
