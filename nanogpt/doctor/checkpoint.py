"""Checks of the checkpoints that would be served: they load and compute, the tokenizer fits, there is a way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nanogpt.doctor.findings import Finding, check, fail, gigabytes, ok, warn
from nanogpt.doctor.here import Here
from nanogpt.errors import NanoGPTError, TokenizerError
from nanogpt.tokenizer.base import Tokenizer

_MAX_IDS = 2000


@check("the-checkpoint")
def checkpoint(here: Here) -> Iterator[Finding]:
    """Every weight is read, none is NaN, and the model writes four tokens."""
    if isinstance(here.refusal, TokenizerError):
        yield warn("The weights are not looked at without a tokenizer.", "Mend what `tokenizer` says first.")
        return
    said = _loads_and_writes(here)
    if not here.settings.model_checkpoint:
        yield warn(
            f"{said} It is the model that lies in the package, which is for trying out.",
            "Set MODEL_CHECKPOINT, or name the checkpoint: nanogpt doctor log/",
        )
    else:
        yield ok(said)


@check("the-checkpoint")
def compare(here: Here) -> Iterator[Finding]:
    """The second model, which a start waits for like the first."""
    if here.second is None:
        yield ok("COMPARE_CHECKPOINT is not set: there is one model.")
    else:
        yield ok(_loads_and_writes(here.second))


def _loads_and_writes(here: Here) -> str:
    """What the model is. Raises: NanoGPTError where it cannot be loaded or does not compute."""
    from nanogpt.checkpoint import card

    if here.checkpoint is None:
        assert here.refusal is not None
        raise here.refusal
    if isinstance(here.trial, NanoGPTError):
        raise here.trial
    known = card(here.checkpoint)
    said = (
        f"{known['name']}: {known['family']}, {known['parameters']:,} parameters, context {known['block_size']:,},"
        f" {gigabytes(known['file_bytes'])}"
    )
    said += "" if known["step"] is None else f", step {known['step']:,}"
    return f"{said}; it loads{' and writes' if here.trial else ''}."


@check("the-tokenizer")
def tokenizer(here: Here) -> Iterator[Finding]:
    """Text becomes tokens, and the tokens the same text."""
    if here.checkpoint is None:
        if isinstance(here.refusal, TokenizerError):
            raise here.refusal
        yield warn("Not looked at: there is no checkpoint that can be loaded.", "Mend what `checkpoint` says first.")
        return
    known = here.checkpoint.tokenizer
    text = sample_text(known)
    if not text or known.decode(known.encode(text)) != text:
        yield fail(
            f"{known.name}: its own tokens do not come back as they went in.",
            "Set NANOGPT_TOKENIZER to the file that the model was trained with.",
        )
    elif known.eos_token_id is None:
        yield ok(f"{known.name}, {known.num_tokens:,} tokens, no end of text: answers end at max_length or a stop.")
    else:
        yield ok(f"{known.name}, {known.num_tokens:,} tokens, end of text {known.eos_token_id}.")


def sample_text(tokenizer: Tokenizer) -> str:
    """All that the first tokens say, but those that are no text by themselves."""
    pieces = []
    for token_id in range(min(tokenizer.num_tokens, _MAX_IDS)):
        if token_id != tokenizer.eos_token_id:
            try:
                pieces.append(tokenizer.token_bytes(token_id).decode())
            except UnicodeDecodeError:  # a part of a character
                continue
    return "".join(pieces)


@check("no-way-back")
def rollback(here: Here) -> Iterator[Finding]:
    """Whether a running server could be taken back: a key for it, and a checkpoint to go back to."""
    settings = here.settings
    if not settings.admin_key:
        yield warn(
            "ADMIN_KEY is not set: going back to the model before takes a restart.",
            "Set ADMIN_KEY; nanogpt rollback is then a switch.",
        )
    elif settings.standby:
        yield ok("After a change the former model stands by, loaded: nanogpt rollback is a switch.")
    else:
        yield ok("NANOGPT_STANDBY is false: nanogpt rollback loads the former checkpoint again.")
    loaded = here.checkpoint
    if loaded is None or not settings.model_checkpoint:
        return
    if not others(loaded.path):
        yield warn(
            f"No other checkpoint lies beside {loaded.path.name}: there is nothing to go back to.",
            "Keep the checkpoint that was served before, under its own name.",
        )
    else:
        yield ok(f"{len(others(loaded.path))} other checkpoints lie beside {loaded.path.name}.")


def others(path: Path) -> list[Path]:
    """The checkpoints beside this one: files with its ending, or folders like it."""
    try:
        return [
            entry
            for entry in sorted(path.parent.iterdir())
            if entry.name != path.name
            and not entry.is_symlink()
            and entry.suffix == path.suffix
            and (
                (entry / "config.json").is_file()
                if path.is_dir()
                else entry.is_file() and entry.stat().st_size * 2 > path.stat().st_size
            )
        ]
    except OSError:
        return []


CHECKS = (checkpoint, compare, tokenizer, rollback)
