"""The keys file: what is in it tells no key, what is wrong in it stops nothing, and a server follows its changes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from nanogpt import cli, keys
from nanogpt.errors import InvalidRequest, SettingsError
from nanogpt.keys import KeyRing, add_key, digest, read_keys, revoke_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def write(path: Path, *items: dict[str, Any], **more: Any) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps({"version": 1, "keys": list(items), **more}))


ALICE = {"name": "alice", "sha256": "a" * 64}


def test_a_new_key_is_random_and_the_file_does_not_tell_it(path: Path) -> None:
    made = [add_key(path, f"n{number}", {}) for number in range(5)]
    assert len(set(made)) == 5
    assert all(key.startswith("ngk_") and len(key) == 56 for key in made)
    assert not any(key[4:] in path.read_text() for key in made)
    assert [key.sha256 for key in read_keys(path)] == [digest(key.encode()) for key in made]


def test_the_file_is_its_owners_alone(path: Path) -> None:
    old = os.umask(0)
    try:
        add_key(path, "alice", {})
        add_key(path, "bob", {})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(SettingsError, match=r"open to others \(mode 0640\).*chmod 600"):
        read_keys(path)


def test_what_was_added_is_listed_until_it_is_revoked(path: Path) -> None:
    add_key(path, "alice", {"requests_per_minute": 5, "tokens_per_minute": None, "max_concurrency": 2})
    add_key(path, "bob", {})
    (alice, bob) = read_keys(path)
    assert (alice.name, alice.requests_per_minute, alice.tokens_per_minute, alice.max_concurrency) == (
        "alice",
        5,
        None,
        2,
    )
    assert alice.created.endswith("Z")
    revoke_key(path, "alice")
    assert read_keys(path) == [bob]
    with pytest.raises(InvalidRequest, match="no key of the name 'alice'"):
        revoke_key(path, "alice")
    with pytest.raises(InvalidRequest, match="of the name bob already"):
        add_key(path, "bob", {})


@pytest.mark.parametrize("name", ["", "default", "a b", "-x", "x" * 65, "ключ", "a\n", "a/b"])
def test_names_that_would_confuse_a_log_are_refused(path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not admitted"):
        add_key(path, name, {})
    assert not path.exists()


def test_writers_at_once_lose_nothing(path: Path) -> None:
    threads = [threading.Thread(target=add_key, args=(path, f"n{number}", {})) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path)} == {f"n{number}" for number in range(20)}


def test_a_link_to_the_file_stays_one(path: Path, tmp_path: Path) -> None:
    add_key(path, "alice", {})
    link = tmp_path / "link.json"
    link.symlink_to(path)
    add_key(link, "bob", {})
    assert link.is_symlink()
    assert len(read_keys(path)) == 2


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("ngk_secret", "no other fields"),
        ({**ALICE, "key": "ngk_secret"}, "no other fields"),
        ({"name": "alice"}, "sha256"),
        ({**ALICE, "sha256": "ngk_secret"}, "64 lowercase"),
        ({**ALICE, "sha256": "A" * 64}, "64 lowercase"),
        ({**ALICE, "name": "default"}, "that is API_KEY's"),
        ({**ALICE, "name": 7}, "a name is"),
        ({**ALICE, "created": 7}, "created must be text"),
        ({**ALICE, "tokens_per_minute": 0}, "tokens_per_minute must be an integer between 1 and"),
        ({**ALICE, "requests_per_minute": True}, "requests_per_minute must be"),
        ({**ALICE, "max_concurrency": 1.5}, "max_concurrency must be"),
    ],
)
def test_a_wrong_entry_is_named_and_not_quoted(path: Path, item: Any, says: str) -> None:
    write(path, ALICE | {"name": "first", "sha256": "f" * 64}, item)
    with pytest.raises(SettingsError, match=r"number 2\)") as refused:
        read_keys(path)
    assert says in str(refused.value)
    assert "ngk_secret" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"keys": []}', '{"version": 2, "keys": []}', "[" * 100_000,
                                  '{"version": 1, "keys": [], "more": 1}', "\ufeffx"])  # fmt: skip
def test_what_is_no_keys_file_is_refused(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"The keys file .*keys\.json (is not JSON|must)"):
        read_keys(path)


def test_two_owners_of_one_key_are_refused(path: Path) -> None:
    write(path, ALICE, ALICE | {"name": "bob"})
    with pytest.raises(SettingsError, match="has a sha256 twice"):
        read_keys(path)


def test_a_missing_file_says_what_makes_it(path: Path) -> None:
    with pytest.raises(SettingsError, match="nanogpt keys add"):
        KeyRing(path)


# -- a server's ring --------------------------------------------------------------------------------------------


@pytest.fixture
def ring(path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyRing:
    """It looks at the file every time."""
    monkeypatch.setattr(keys, "_LOOK_S", 0.0)
    write(path)
    return KeyRing(path)


def test_keys_come_and_go_without_a_restart(path: Path, ring: KeyRing) -> None:
    key = add_key(path, "alice", {"max_concurrency": 3}).encode()
    found = ring.find(key)
    assert found is not None
    assert (found.name, found.max_concurrency) == ("alice", 3)
    assert ring.find(key + b"x") is None
    assert ring.find(found.sha256.encode()) is None, "the file's content opens nothing"
    revoke_key(path, "alice")
    assert ring.find(key) is None


def test_a_file_that_breaks_changes_nothing_and_is_told_once(
    path: Path, ring: KeyRing, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(path, "alice", {}).encode()
    assert ring.find(key)
    good = path.read_text()
    for wrong in ("half a file", None):
        caplog.clear()
        path.write_text(wrong) if wrong else path.unlink()
        for _ in range(3):
            assert ring.find(key)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "The former keys stay" in caplog.text
    path.touch(mode=0o600)
    path.write_text(good.replace("alice", "carol"))
    found = ring.find(key)
    assert found is not None
    assert found.name == "carol"


def test_the_file_is_looked_at_once_a_second_at_most(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path)
    ring = KeyRing(path)
    looks: list[Path] = []
    monkeypatch.setattr(keys, "_signature", lambda path: looks.append(path) or (1,))
    for _ in range(100):
        ring.find(b"x")
    assert len(looks) == 1


# -- the command ------------------------------------------------------------------------------------------------


def test_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "add", "alice", "--file", str(path), "--tokens-per-minute", "500"]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyRing(path).find(key.encode())
    assert cli.main(["keys", "list", "--file", str(path)]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == ["NAME", "alice"]
    assert "500" in listed
    assert key not in listed
    assert cli.main(["keys", "revoke", "alice", "--file", str(path)]) == 0
    assert read_keys(path) == []


def test_the_command_finds_the_file_in_the_settings(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_KEYS_FILE", str(path))
    assert cli.main(["keys", "add", "alice"]) == 0
    assert [key.name for key in read_keys(path)] == ["alice"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add"], "needs a NAME"),
        (["list", "alice"], "takes no NAME"),
        (["add", "alice"], "No keys file is set"),
        (["add", "alice", "--file", "k", "--max-concurrency", "0"], "--max-concurrency is 0"),
        (["revoke", "alice", "--file", "k", "--max-concurrency", "1"], "only add takes limits"),
        (["list", "--file", "/no/such/file"], "There is no keys file /no/such/file"),
        (["add", "alice", "--file", "/no/such/file"], "Cannot write the keys file"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOGPT_KEYS_FILE", raising=False)
    assert cli.main(["keys", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_command_needs_no_server() -> None:
    """It answers at once, and works where flask does not."""
    code = (
        "import sys, nanogpt.cli; nanogpt.cli.main(['keys', 'list', '--file', '/none']); "
        "print([m for m in ('flask', 'torch', 'numpy', 'nanogpt.web') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]"
