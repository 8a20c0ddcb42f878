"""``nanogpt convert`` and ``nanogpt inspect``, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import trained_here_file, write_huggingface, write_nanogpt

from nanogpt.checkpoint import load_checkpoint, weights_sha256
from nanogpt.checkpoint.convert import convert
from nanogpt.cli import main
from nanogpt.errors import CheckpointError, UnsupportedCheckpoint


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", ["huggingface", "nanogpt"])
def test_there_and_back(target: str, bias: bool, tmp_path: Path) -> None:
    original = load_checkpoint(write_nanogpt(tmp_path / "in", bias=bias))
    convert(original, tmp_path / "out", target)
    again = load_checkpoint(tmp_path / "out")
    assert weights_sha256(again) == weights_sha256(original)
    assert again.config == original.config
    assert (again.step, again.recorded_loss) == (7, 1.25)
    assert again.tokenizer.encode("a c\n") == original.tokenizer.encode("a c\n")


@pytest.mark.parametrize("target", ["huggingface", "nanogpt"])
def test_a_padded_vocabulary_of_characters(target: str, tmp_path: Path) -> None:
    """nanoGPT has no padding for ids without a character: those rows are left out there."""
    path = tmp_path / "model_00007.pt"
    path.write_bytes(trained_here_file(padding=3, activation="gelu_erf"))
    convert(load_checkpoint(path), tmp_path / "out", target)
    again = load_checkpoint(tmp_path / "out").config
    assert (again.vocab_size, again.num_tokens) == (8 if target == "huggingface" else 5, 5)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    original = load_checkpoint(write_nanogpt(tmp_path / "in"))
    for target in ("huggingface", "nanogpt"):
        folders = [tmp_path / f"{target}{i}" for i in range(2)]
        for folder in folders:
            convert(original, folder, target)
        for file in folders[0].iterdir():
            assert file.read_bytes() == (folders[1] / file.name).read_bytes()


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    original = load_checkpoint(write_nanogpt(tmp_path / "in"))
    folder = tmp_path / "out"
    folder.mkdir()
    convert(original, folder, "huggingface")  # an empty folder is nobody's
    before = {file.name for file in folder.iterdir()}
    with pytest.raises(CheckpointError, match="--force"):
        convert(original, folder, "nanogpt")
    assert {file.name for file in folder.iterdir()} == before
    convert(original, folder, "nanogpt", force=True)
    assert {file.name for file in folder.iterdir()} == {"ckpt.pt", "meta.pkl"}
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        convert(original, folder, "huggingface", force=True)
    with pytest.raises(CheckpointError, match="is a file"):
        convert(original, folder / "thesis.tex", "huggingface", force=True)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = load_checkpoint(write_nanogpt(tmp_path / "in"))
    convert(original, tmp_path / "out", "huggingface")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanogpt.checkpoint.tokenizer_export.write_huggingface", full)
    for folder, force in ((tmp_path / "new", False), (tmp_path / "out", True)):
        with pytest.raises(CheckpointError, match="No space left"):
            convert(original, folder, "huggingface", force=force)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert weights_sha256(load_checkpoint(tmp_path / "out")) == weights_sha256(original)


def test_what_a_target_cannot_hold_is_refused(tmp_path: Path) -> None:
    wide = load_checkpoint(write_huggingface(tmp_path / "eps", layer_norm_epsilon=1e-6, activation_function="gelu"))
    with pytest.raises(UnsupportedCheckpoint, match=r"LayerNorm has eps 1e-06"):
        convert(wide, tmp_path / "out", "nanogpt")
    tanh = load_checkpoint(write_huggingface(tmp_path / "tanh"))
    with pytest.raises(UnsupportedCheckpoint, match="--change-gelu"):
        convert(tanh, tmp_path / "out", "nanogpt")
    notes = convert(tanh, tmp_path / "out", "nanogpt", change_gelu=True)
    assert any("GELU changed" in note for note in notes)
    with pytest.raises(UnsupportedCheckpoint, match=r"llm\.c's tokenizer file cannot hold"):
        convert(tanh, tmp_path / "llmc", "llmc")
    assert not (tmp_path / "llmc").exists()


def test_bfloat16_stays_bfloat16(shared_checkpoints: Path, tmp_path: Path) -> None:
    original = load_checkpoint(shared_checkpoints / "05_llmc" / "gpt2_d2_bf16.bin")
    convert(original, tmp_path / "out", "huggingface")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_checkpoint(tmp_path / "out")
    for name, tensor in original.tensors.items():
        assert again.tensors[name].dtype == "bfloat16"
        np.testing.assert_array_equal(again.tensors[name].raw, tensor.raw)


# -- the commands ---------------------------------------------------------------------------------------------


def test_convert_says_what_it_wrote_and_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_nanogpt(tmp_path / "in", bias=False)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert "zeros were written" in out
    assert main(["convert", str(path), str(tmp_path / "out")]) != 0
    assert "--force" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "tanh"), "--gelu", "tanh"]) == 0
    assert load_checkpoint(tmp_path / "tanh").config.activation == "gelu_tanh"


def test_inspect_prints_the_card(shared_checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shared_checkpoints / "04_nano-gpt_fork" / "log")]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line[:12].strip(): line[12:] for line in lines if line[:12].strip()}
    assert shown["model"] == "model_00100"
    assert shown["family"] == "build-nanogpt"
    assert shown["step"] == "100"
    assert shown["loss"] == "7.3486 (recorded in the file)"
    assert shown["parameters"] == "813,504 in float32, 3.3 MB"
    assert shown["vocabulary"] == "50,257 tokens, padded to 50,304 rows"
    assert shown["GELU"] == "tanh (approximation)"
    assert len(shown["SHA-256"]) == 64


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a file: the model in the package."""
    assert main(["inspect", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parameters"] == 2_718_336
    assert described["weights_sha256"] == weights_sha256(load_checkpoint())
    assert main(["inspect", "--json", "--no-hash"]) == 0
    assert "weights_sha256" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["inspect", "/nowhere"], ["convert", "/nowhere", "/tmp/x"]])
def test_a_wrong_path_is_an_error_of_ours(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "nothing at /nowhere" in capsys.readouterr().err


def test_the_proof_is_the_golden_loss(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss of the last tenth of tinyshakespeare, as the upstream's own code computed it."""
    folder = shared / "checkpoints" / "01b_nanogpt_char_tiny"
    text = (shared / "data" / "tinyshakespeare.txt").read_text("utf-8")
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(text[int(len(text) * 0.9) :], "utf-8")
    assert main(["inspect", str(folder), "--json", "--proof", str(held_out), "--precision", "fp32"]) == 0
    proof = json.loads(capsys.readouterr().out)["proof"]
    golden = json.loads((folder / "golden.json").read_text())["cross_entropy"]
    assert proof["predictions"] == golden["predictions"]
    assert proof["loss"] == pytest.approx(golden["mean_nats"], abs=1e-3)
    assert main(["inspect", str(folder), "--no-hash", "--proof", str(held_out), "--precision", "fp32"]) == 0
    assert "recorded in the file: 2.5871" in capsys.readouterr().out


def test_a_proof_needs_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("To be")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for arguments, words in (
        (["--proof", str(tmp_path / "missing.txt")], "Cannot read"),
        (["--proof", str(tmp_path / "binary.txt")], "not UTF-8"),
        (["--proof", str(tmp_path / "short.txt")], "only 5 tokens"),
        (["--proof", str(tmp_path / "short.txt"), "--proof-tokens", "1"], "--proof-tokens"),
    ):
        assert main(["inspect", "--no-hash", *arguments]) == 2
        assert words in capsys.readouterr().err
