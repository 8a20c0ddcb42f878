"""Protects the operator: what was written is what is used, and what was mistyped is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nanogpt.errors import SettingsError
from nanogpt.settings import Settings

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def load(
    flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None, config: Path | None = None
) -> Settings:
    return Settings.load(flags, environ=environ or {}, config=str(config) if config else None)


def test_defaults_are_the_guides() -> None:
    settings = load()
    assert (settings.port, settings.max_prompt_chars, settings.max_new_tokens) == (5000, 1000, 500)
    assert settings.model_checkpoint == ""
    assert settings.host == "127.0.0.1", "a server that nobody configured is not open to the network"


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = 1\nthreads = 3\nmax_queue = 4\n")
    settings = load({"port": 3, "threads": None}, {"PORT": "2", "NANOGPT_MAX_QUEUE": "5"}, file)
    assert settings.port == 3
    assert settings.max_queue == 5
    assert settings.threads == 3, "a flag that was not given (None) leaves the file's value"
    assert settings.max_batch_size == FIELDS["max_batch_size"].default


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = 8080\n")
    assert load(environ={"NANOGPT_CONFIG": str(file)}).port == 8080


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"NANOGPT_MAX_BATCH": "8"}, ["NANOGPT_MAX_BATCH", "Did you mean NANOGPT_MAX_BATCH_SIZE"]),
        ({"PORT": "http"}, ["PORT", "'http'", "an integer"]),
        ({"PORT": "70000"}, ["PORT", "70000", "65535"]),
        ({"NANOGPT_DEVICE": "tpu"}, ["NANOGPT_DEVICE", "'tpu'", "auto, cpu, cuda"]),
        ({"NANOGPT_REQUEST_TIMEOUT_S": "nan"}, ["NANOGPT_REQUEST_TIMEOUT_S", "nan", "between"]),
        ({"NANOGPT_PREFIX_CACHE": "maybe"}, ["NANOGPT_PREFIX_CACHE", "'maybe'", "true or false"]),
        ({"NANOGPT_CONFIG": "/nowhere/server.toml"}, ["/nowhere/server.toml", "No such file"]),
    ],
)
def test_a_wrong_variable_is_refused_by_name(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(environ=environ)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_a_flag_is_refused_by_its_own_name() -> None:
    with pytest.raises(SettingsError, match="--max-queue is 'many'"):
        load({"max_queue": "many"})
    with pytest.raises(SettingsError, match=r"Unknown setting 'max_que'.*Did you mean max_queue"):
        load({"max_que": 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1\n", ["'prot'", "Did you mean port"]),
        ("port = 'http'\n", ["port in the settings file", "'http'"]),
        ("port = true\n", ["port in the settings file", "an integer"]),
        ("port =\n", ["is not TOML"]),
        ("[server]\nport = 1\n", ["'server'"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(config=file)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Cannot read the settings file"):
        load(config=tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="is not TOML"):
        load(config=tmp_path / "binary.toml")


@pytest.mark.parametrize("word", ["1", "true", "YES", " on "])
def test_words_for_true(word: str) -> None:
    assert load(environ={"NANOGPT_PREFIX_CACHE": word}).prefix_cache is True


@pytest.mark.parametrize("word", ["0", "false", "No", "off"])
def test_words_for_false(word: str) -> None:
    assert load(environ={"NANOGPT_PREFIX_CACHE": word}).prefix_cache is False


def test_variables_of_others_are_none_of_ours() -> None:
    assert load(environ={"PATH": "/bin", "POSTGRES_PORT": "x"}) == Settings()


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    """Compose files and systemd units pass `PORT=` for what nobody filled in."""
    assert load(environ={"PORT": "", "NANOGPT_DEVICE": "", "API_KEY": ""}) == Settings()


def test_a_child_process_gets_the_same_settings() -> None:
    settings = load({"port": 8080}, {"API_KEY": "secret", "NANOGPT_PREFIX_CACHE": "off"})
    assert Settings.from_json(settings.to_json()) == settings


def test_the_key_is_not_printed() -> None:
    assert "secret" not in repr(load(environ={"API_KEY": "secret"}))


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_setting_says_what_it_does_and_its_limits(name: str) -> None:
    field = FIELDS[name]
    data = field.metadata
    assert data["help"].endswith(".")
    assert data["env"].startswith("NANOGPT_") or data["env"] in {"MODEL_CHECKPOINT", "HOST", "PORT", "API_KEY",
                                                                  "ADMIN_KEY", "COMPARE_CHECKPOINT", "REDIS_URL",
                                                                  "RATE_LIMIT"}  # fmt: skip
    if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
        assert data["low"] is not None
        assert data["high"] is not None, "a number without limits is an accident that waits"
