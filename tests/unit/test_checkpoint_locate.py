"""From a path to a checkpoint: folders, links that were flattened, and what people name by mistake."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from checkpoint_files import llmc_file, nanogpt_file, write_huggingface, write_meta, write_nanogpt

from nanogpt.checkpoint import load_checkpoint
from nanogpt.checkpoint.locate import EMBEDDED, follow, locate
from nanogpt.errors import CheckpointNotFound, CorruptCheckpoint, TokenizerError, UnsupportedCheckpoint


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"PK\x03\x04")


def test_an_empty_path_is_the_embedded_model() -> None:
    checkpoint = load_checkpoint("")
    assert checkpoint.path == EMBEDDED == load_checkpoint().path
    assert checkpoint.tokenizer.name == "characters"


def test_the_latest_link_wins_over_the_newest_step(tmp_path: Path) -> None:
    touch(tmp_path, "model_00100.pt", "model_00200.pt")
    assert locate(tmp_path).path.name == "model_00200.pt"
    (tmp_path / "latest_checkpoint.pt").symlink_to("model_00100.pt")
    assert locate(tmp_path).path.resolve().name == "model_00100.pt"


def test_a_flattened_link_is_followed_as_the_link_it_was(tmp_path: Path) -> None:
    """zip, git and scp turn a symlink into a small file that holds its target."""
    touch(tmp_path, "model_00100.pt", "model_00200.pt")
    for text in ("model_00100.pt", "model_00100.pt\n", "./model_00100.pt"):
        (tmp_path / "latest_checkpoint.pt").write_text(text)
        assert locate(tmp_path).path.name == "model_00100.pt"
        assert locate(tmp_path / "latest_checkpoint.pt").path.name == "model_00100.pt"


def test_a_dangling_link_gives_way_to_the_newest_step(tmp_path: Path) -> None:
    touch(tmp_path, "model_00100.pt")
    (tmp_path / "latest_checkpoint.pt").write_text("model_00900.pt")
    assert locate(tmp_path).path.name == "model_00100.pt"


@pytest.mark.parametrize("text", ["", "a\nb", "/etc/passwd", "x" * 2000, "\x00", "missing", "{}", "a" * 300])
def test_other_small_files_are_no_links(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    assert follow(tmp_path / "file") == tmp_path / "file"


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("b")
    (tmp_path / "b").write_text("a")
    with pytest.raises(CheckpointNotFound, match="circle"):
        follow(tmp_path / "a")


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "model_9.pt", "model_10.pt", "optim_99_rank0.pt", "log.txt")
    assert locate(tmp_path).path.name == "model_10.pt"
    touch(tmp_path, "model_final.pt")
    assert locate(tmp_path).path.name == "model_final.pt"


def test_a_folder_of_nanogpt(tmp_path: Path) -> None:
    touch(tmp_path, "ckpt.pt", "notes.bin")
    assert locate(tmp_path).path.name == "ckpt.pt"


def test_a_folder_with_several_models_asks_which(tmp_path: Path) -> None:
    touch(tmp_path, "a.bin", "b.bin", "gpt2_tokenizer.bin")
    with pytest.raises(CheckpointNotFound, match=r"several models: a\.bin, b\.bin"):
        locate(tmp_path)
    (tmp_path / "b.bin").unlink()
    assert locate(tmp_path).path.name == "a.bin"


@pytest.mark.parametrize("name", ["", "model.safetensors", "config.json"])
def test_a_hugging_face_folder_by_any_of_its_files(name: str, tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "gpt2-small")
    checkpoint = load_checkpoint(folder / name)
    assert (checkpoint.path, checkpoint.name) == (folder, "gpt2-small")


def test_names_of_models(tmp_path: Path) -> None:
    assert load_checkpoint(write_nanogpt(tmp_path / "out-letters")).name == "out-letters"


def test_an_empty_folder_says_so_and_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no checkpoint in the folder"):
        locate(tmp_path)
    touch(tmp_path / "log", "model_00100.pt")
    with pytest.raises(CheckpointNotFound, match="there is log/"):
        locate(tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"nothing at .*model_1\.pt.*model_00100\.pt"):
        locate(tmp_path / "log" / "model_1.pt")
    with pytest.raises(CheckpointNotFound, match=r"Give a file, or a folder such as log/"):
        locate(tmp_path / "missing" / "model_1.pt")


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/x", "x" * 5000])
def test_texts_that_are_no_paths(path: str) -> None:
    with pytest.raises(CheckpointNotFound):
        locate(path)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    """Opening it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointNotFound, match="neither a file nor a folder"):
        locate(tmp_path / "pipe.pt")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_nanogpt(tmp_path)
    original = Path.open

    def deny(self: Path, *args: object, **kwargs: object) -> object:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(CheckpointNotFound, match=r"Cannot read .*ckpt\.pt: Permission denied"):
        load_checkpoint(path)


OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
STRANGERS = {
    "old torch": (OLD_TORCH, "before version 1.6"),
    "pickle": (b"\x80\x04N.", "bare pickle"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "gzip": (b"\x1f\x8b\x08\x00", "gzip"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS"),
    "text": (b"step 0 loss 10.9\nstep 1 loss 10.8\n", "text file"),
    "llm.c's tokenizer": (struct.pack("<3I", 20240328, 2, 50257) + bytes(1012), "tokenizer file"),
    "bytes": (bytes(range(1, 200)), "begins like no checkpoint"),
    "one byte": (b"\x00", "begins like no checkpoint"),
    "zeros": (bytes(4096), "begins like no checkpoint"),
    "half a magic": (b"PK\x03", "begins like no checkpoint"),
    "nothing": (b"", "is empty"),
}


@pytest.mark.parametrize(("data", "words"), STRANGERS.values(), ids=STRANGERS)
def test_files_that_are_no_checkpoints_are_told_apart(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises((CorruptCheckpoint, UnsupportedCheckpoint), match=words) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_safetensors_alone_need_their_config(tmp_path: Path) -> None:
    (write_huggingface(tmp_path) / "config.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"without a config\.json"):
        load_checkpoint(tmp_path / "model.safetensors")


# -- the tokenizer beside it ----------------------------------------------------------------------------------


def test_meta_is_found_where_nanogpt_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data/<dataset>/meta.pkl, from the folder of the checkpoint, one above it, or the current one."""
    project, elsewhere = tmp_path / "nanoGPT", tmp_path / "elsewhere"
    (project / "out-letters").mkdir(parents=True)
    (project / "data" / "letters").mkdir(parents=True)
    elsewhere.mkdir()
    checkpoint = project / "out-letters" / "ckpt.pt"
    checkpoint.write_bytes(nanogpt_file())
    write_meta(project / "data" / "letters")
    assert load_checkpoint(checkpoint).tokenizer.name == "characters"

    moved = elsewhere / "ckpt.pt"
    checkpoint.rename(moved)
    with pytest.raises(TokenizerError, match=r"Put the dataset's meta\.pkl beside"):
        load_checkpoint(moved)
    monkeypatch.chdir(project)
    assert load_checkpoint(moved).tokenizer.name == "characters"
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint(moved, tokenizer=str(project / "data/letters/meta.pkl")).tokenizer.name == "characters"


@pytest.mark.parametrize("dataset", ["../letters", "/etc", "a\0b", "x" * 3000, "", 7, None, ["letters"]])
def test_a_dataset_cannot_lead_elsewhere(dataset: object, tmp_path: Path) -> None:
    write_meta(tmp_path)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "ckpt.pt"
    path.write_bytes(nanogpt_file(config={"dataset": dataset}))
    with pytest.raises(TokenizerError, match=r"meta\.pkl"):
        load_checkpoint(path)


def test_the_wrong_characters_are_refused(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match="tokenizer knows"):
        load_checkpoint(path, tokenizer="gpt2")
    (tmp_path / "few.json").write_text('{"characters": ["a"]}')
    with pytest.raises(TokenizerError, match="do not belong together"):
        load_checkpoint(path, tokenizer=str(tmp_path / "few.json"))


def test_the_gelu_can_be_overridden(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path)
    assert load_checkpoint(path).config.activation == "gelu_erf"
    changed = load_checkpoint(path, activation="gelu_tanh")
    assert changed.config.activation == "gelu_tanh"
    assert "GELU: set to gelu_tanh." in changed.notes


def test_llmc_without_its_tokenizer_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(llmc_file())
    with pytest.raises(TokenizerError, match="NANOGPT_TOKENIZER"):
        load_checkpoint(path)
    assert load_checkpoint(path, tokenizer=str(write_meta(tmp_path))).config.vocab_size == 5
