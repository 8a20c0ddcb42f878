"""``nanogpt doctor``: what a check is, and the command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor_support import Capture, found

from nanogpt import cli
from nanogpt.doctor import checkpoint, configuration, machine
from nanogpt.doctor.findings import Finding, check, fail, ok, warn
from nanogpt.errors import NanoGPTError

# -- what a check is --------------------------------------------------------------------------------------------


def test_a_check_is_its_functions_name_and_points_to_its_chapter() -> None:
    @check("the-clock")
    def sundial(subject: str) -> Iterator[Finding]:
        yield ok(subject)
        yield warn("forged\nline", "Mend it.")

    good, forged = sundial.run("right")
    assert good == Finding("ok", "right", "", "sundial", "docs/troubleshooting.md#the-clock")
    assert "\n" not in forged.says, "what a server says of itself cannot write lines of ours"


def test_an_error_of_ours_is_a_finding_with_its_own_remedy() -> None:
    @check("redis")
    def refuses(subject: str) -> Iterator[Finding]:
        raise NanoGPTError("It is broken.", remedy="Mend it.")

    assert found(refuses, "")[0].to_dict() == {
        "check": "refuses",
        "status": "fail",
        "says": "It is broken.",
        "remedy": "Mend it.",
        "see": "docs/troubleshooting.md#redis",
    }


def test_every_remedy_is_said() -> None:
    with pytest.raises(TypeError):
        warn("something")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        fail("something")  # type: ignore[call-arg]


# -- the command ------------------------------------------------------------------------------------------------


def run(*words: str) -> int:
    return cli.main(["doctor", *words])


def test_the_same_words_as_serve_and_json_that_a_script_reads(model: str, capsys: Capture) -> None:
    assert run(model, "--port", "0", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {finding["check"] for finding in report["findings"]} == {
        check.name for module in (checkpoint, machine, configuration) for check in module.CHECKS
    }
    assert sum(report["counts"].values()) == len(report["findings"])
    assert all(finding["remedy"] for finding in report["findings"] if finding["status"] != "ok")


def test_the_second_checkpoint_is_looked_at_like_the_first(model: str, capsys: Capture) -> None:
    """A start waits for both: one that cannot be loaded ends it, so the doctor says so before."""

    def report(*more: str) -> dict[str, list[dict[str, str]]]:
        run(model, "--port", "0", "--json", *more)
        by_check: dict[str, list[dict[str, str]]] = {}
        for finding in json.loads(capsys.readouterr().out)["findings"]:
            by_check.setdefault(finding["check"], []).append(finding)
        return by_check

    both = report("--compare-checkpoint", model)
    assert "loads and writes" in both["compare"][0]["says"]
    assert both["memory"][0]["says"].startswith("Serving two models")
    broken = report("--compare-checkpoint", "/no/such/file")
    assert (broken["compare"][0]["status"], broken["memory"][0]["status"]) == ("fail", "warn")
    assert "/no/such/file" in broken["compare"][0]["says"]
    assert "`compare`" in broken["memory"][0]["remedy"]
    assert broken["checkpoint"][0]["status"] == "ok"


def test_one_failure_is_exit_code_1_and_its_remedy_is_printed(tmp_path: Path, capsys: Capture) -> None:
    assert run(str(tmp_path / "nothing.pt"), "--port", "0") == 1
    out = capsys.readouterr().out
    assert "fail  checkpoint        There is nothing at" in out
    assert "docs/troubleshooting.md#the-checkpoint" in out


@pytest.mark.parametrize(
    "words",
    [
        ("--port", "many"),
        ("log/", "--url", "http://localhost:5000"),
        ("--url", "http://localhost:5000", "--config", "x.toml"),
        ("--checklist", "--threads", "2"),
        ("--url", "http://localhost:5000", "--timeout", "0"),
        ("--url", "http://localhost:5000", "--api-key-file", "/no/such/file"),
        ("--no-such-flag",),
    ],
)
def test_what_cannot_be_asked_is_exit_code_2(words: tuple[str, ...], capsys: Capture) -> None:
    assert run(*words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "error" in error


def test_no_key_is_ever_printed(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setenv("API_KEY", "s3cret-api")
    monkeypatch.setenv("ADMIN_KEY", "s3cret-admin")
    monkeypatch.setenv("REDIS_URL", "redis://:s3cret-redis@127.0.0.1:1/0")
    (tmp_path / "key").write_text("s3cret-file\n")
    assert run(model, "--port", "0") == 1
    assert run("--url", "http://gpt.example.com") == 2
    assert run("--url", "http://gpt.example.com", "--api-key-file", str(tmp_path / "key")) == 2
    assert run("--url", "http://127.0.0.1:1", "--json") == 1
    out, error = capsys.readouterr()
    assert "s3cret" not in out + error
    assert "Redis at 127.0.0.1:1 does not answer" in out
    assert os.environ["API_KEY"] == "s3cret-api"
