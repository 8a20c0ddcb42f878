"""The engine's tokenizer is read in a process of its own: what comes back, and what becomes of an error there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nanogpt.checkpoint import load_checkpoint
from nanogpt.checkpoint.load import Found
from nanogpt.engine.described import DescribedTokenizer, _describe, read_apart
from nanogpt.errors import TokenizerError

FAMILIES = ["01_nanogpt_char", "03_build_nanogpt/log", "05_llmc/gpt2_d2.bin", "06_hf_gpt2/safetensors"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_read_with_it_is_the_same(shared_checkpoints: Path, name: str) -> None:
    here = load_checkpoint(shared_checkpoints / name)
    apart = load_checkpoint(shared_checkpoints / name, read_tokenizer=read_apart)
    assert isinstance(apart.tokenizer, DescribedTokenizer)
    assert (apart.config, apart.notes) == (here.config, here.notes)
    assert apart.tokenizer.to_spec() == here.tokenizer.to_spec()
    for of in ("name", "num_tokens", "eos_token_id"):
        assert getattr(apart.tokenizer, of) == getattr(here.tokenizer, of)
    text = "To be, or not"
    assert apart.tokenizer.encode(text) == here.tokenizer.encode(text)
    assert apart.tokenizer.decode(apart.tokenizer.encode(text)) == text
    assert apart.tokenizer.token_bytes(1) == here.tokenizer.token_bytes(1)
    assert "_tokenizer" not in vars(load_checkpoint(shared_checkpoints / name, read_tokenizer=read_apart).tokenizer)


def test_an_error_comes_back_as_it_is(shared_checkpoints: Path) -> None:
    with pytest.raises(TokenizerError, match="There is no tokenizer nowhere") as error:
        load_checkpoint(shared_checkpoints / "01_nanogpt_char", tokenizer="nowhere.json", read_tokenizer=read_apart)
    assert error.value.field == "tokenizer"
    assert "gpt2, or a path" in (error.value.remedy or "")


def test_what_is_unforeseen_is_shown_and_ends_the_load(capfd: pytest.CaptureFixture[str]) -> None:
    def find() -> Found:
        raise ZeroDivisionError("nobody thought of it")

    with pytest.raises(RuntimeError, match="has failed"):
        read_apart(find)
    assert "nobody thought of it" in capfd.readouterr().err


def test_a_process_that_the_system_ends_counts_as_too_little_memory() -> None:
    def find() -> Found:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(MemoryError):
        read_apart(find)


def test_it_says_nothing_when_the_engine_was_ended_meanwhile(
    shared_checkpoints: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_checkpoint(shared_checkpoints / "01_nanogpt_char").tokenizer
    reading, writing = os.pipe()
    os.close(reading)
    child = os.fork()
    if child == 0:
        _describe(lambda: (tokenizer, ()), writing)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert capfd.readouterr().err == ""


def test_no_process_is_left(shared_checkpoints: Path) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    load_checkpoint(shared_checkpoints / "01_nanogpt_char", read_tokenizer=read_apart)
    assert children.read_text() == before
