"""Protects whoever sits at a terminal: words instead of tracebacks, exit codes that scripts can rely on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from support import ROOT

from nanogpt import cli
from nanogpt._version import __version__
from nanogpt.cli import _arguments, generate
from nanogpt.errors import CheckpointNotFound, EngineDied
from nanogpt.llm import Completion
from nanogpt.sampling_params import SamplingParams, TokenLogprobs

Capture = pytest.CaptureFixture[str]


class FakeLLM:
    """Answers every prompt with the same words, one at a time, and keeps what it was asked."""

    def __init__(self, words: tuple[str, ...] = (" there", " was", " a village")) -> None:
        self.words = words
        self.card = {"name": "model_40000"}
        self.asked: list[tuple[Any, SamplingParams]] = []

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[str]:
        self.asked.append((prompt, params))
        yield from self.words

    def generate(self, prompts: list[Any], params: SamplingParams) -> list[Any]:
        text = "".join(self.stream(prompts[0], params))
        logprobs = [TokenLogprobs(-0.5, 1, [(7, -0.5)])] if params.logprobs is not None else None
        return [Completion(prompts[0], [8, 9], text, [1, 2, 3], "length", logprobs=logprobs)]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()

    def open_model(args: argparse.Namespace) -> FakeLLM:
        fake.checkpoint = args.checkpoint  # type: ignore[attr-defined]
        return fake

    monkeypatch.setattr(generate, "open_model", open_model)
    return fake


def python(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, **kwargs
    )  # fmt: skip


# -- the command itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_every_command(argv: list[str], capsys: Capture) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name in cli.command_names():
        assert re.search(rf"^  {name}  +\w", out, re.M), f"{name} has no line of help"


@pytest.mark.parametrize("name", cli.command_names())
def test_every_command_explains_itself(name: str, capsys: Capture) -> None:
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: nanogpt {name}")
    assert cli.command_parser(name)[1].HELP in out


def test_version(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanogpt {__version__}\n"


def test_python_m_nanogpt_is_the_same_command() -> None:
    result = python("-m", "nanogpt", "--version")
    assert (result.returncode, result.stdout) == (0, f"nanogpt {__version__}\n")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generat"], "There is no command 'generat'. Did you mean generate?"),
        (["xyzzy"], "There is no command 'xyzzy'. nanogpt --help lists the commands."),
        (["--verison"], "There is no option '--verison'."),
    ],
)
def test_an_unknown_command_is_refused_with_a_suggestion(argv: list[str], words: str, capsys: Capture) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"nanogpt: error: {words}")


@pytest.mark.parametrize(
    "error", [CheckpointNotFound("No file at log/x.pt.", remedy="Train one."), EngineDied("Gone.")]
)
def test_our_errors_are_one_line_and_their_exit_code(
    error: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(generate, "run", run)
    assert cli.main(["generate", "x"]) == error.exit_code
    assert capsys.readouterr().err == f"nanogpt: error: {error}\n"


def test_ctrl_c_is_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", run)
    assert cli.main(["generate", "x"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_gone_is_no_error() -> None:
    """`nanogpt … | head -1` printed a BrokenPipeError, and Python another one when it flushed at exit."""
    code = (
        "import sys, nanogpt.cli as c; from types import ModuleType as M; m = M('m'); m.HELP = ''\n"
        "m.add_arguments = lambda parser: None\n"
        "def run(args):\n"
        "    while True: print('word ' * 1000)\n"
        "m.run = run\n"
        "sys.modules['nanogpt.cli.generate'] = m\n"
        "sys.exit(c.main(['generate']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


# -- generate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "checkpoint", "prompt"),
    [
        (["Once upon a time"], None, "Once upon a time"),
        (["log/model_40000.pt", "Once"], "log/model_40000.pt", "Once"),
        (["README.md", "Once"], "README.md", "Once"),
        (["--prompt", "Once"], None, "Once"),
        (["log/model_40000.pt", "--prompt", "Once"], "log/model_40000.pt", "Once"),
        (["--prompt", "README.md"], None, "README.md"),
        (["--prompt", ""], None, ""),
    ],
)
def test_which_argument_is_what(
    argv: list[str], checkpoint: str | None, prompt: str, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["generate", *argv]) == 0
    assert llm.asked[0][0] == prompt
    assert llm.checkpoint == checkpoint  # type: ignore[attr-defined]
    assert capsys.readouterr().out == f"{prompt} there was a village\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Prompt is required."),
        (["Once", "upon", "a"], "There are 3 arguments"),
        (["README.md"], "README.md is a file or folder here, and there is no prompt"),
        (["a.pt", "Once", "--prompt", "Twice"], "--prompt gives the prompt"),
        (["Once", "--temperature", "-1"], "temperature must be between 0 and 100"),
        (["Once", "--top-p", "nan"], "top_p must be a finite number"),
        (["Once", "--logprobs", "2"], "Add --json"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    argv: list[str], words: str, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["generate", *argv]) == 2
    assert words in capsys.readouterr().err
    assert not llm.asked, "it was refused before a model was loaded"


def test_a_prompt_from_standard_input(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("从前有座山\n"))
    assert cli.main(["generate", "-", "--no-prompt"]) == 0
    assert llm.asked[0][0] == "从前有座山\n"
    assert capsys.readouterr().out == " there was a village\n"


def test_json_is_the_answer_of_the_api(llm: FakeLLM, capsys: Capture) -> None:
    assert cli.main(["generate", "很久以前", "--json"]) == 0
    out = capsys.readouterr().out
    assert "很久以前" in out, "not escaped"
    answer = json.loads(out)
    assert answer["prompt"] == "很久以前"
    assert answer["generated_text"] == "很久以前 there was a village"
    assert answer["tokens_generated"] == 3
    assert answer["finish_reason"] == "length"
    assert answer["model"] == "model_40000"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert "logprobs" not in answer


def test_log_probabilities_are_in_the_json(llm: FakeLLM, capsys: Capture) -> None:
    assert cli.main(["generate", "Once", "--json", "--logprobs", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["logprobs"] == [{"logprob": -0.5, "rank": 1, "top": [[7, -0.5]]}]


def test_every_sampling_parameter_has_a_flag(llm: FakeLLM) -> None:
    wanted = SamplingParams(
        max_tokens=7, logit_bias={5: -2.5, 6: 1.0}, repetition_penalty=1.1, presence_penalty=0.1,
        frequency_penalty=0.2, temperature=0.0, top_k=3, top_p=0.9, min_p=0.05, seed=-1, stop=["\n", "END"],
        stop_token_ids=[0, 1], ignore_eos=True, logprobs=2, prompt_logprobs=1,
    )  # fmt: skip
    argv = ["generate", "Once", "--json"]
    for field in dataclasses.fields(SamplingParams):
        if field.name == "grammar":
            continue  # a program writes one, not a person
        flag, value = "--" + field.name.replace("_", "-"), getattr(wanted, field.name)
        assert value != field.default, f"{field.name}: this test must ask for something else than the default"
        if field.name == "ignore_eos":
            argv.append(flag)
        elif field.name == "logit_bias":
            argv += [part for key, bias in value.items() for part in (flag, f"{key}={bias}")]
        else:
            argv += [part for item in (value if isinstance(value, tuple) else [value]) for part in (flag, str(item))]
    assert cli.main(argv) == 0
    assert llm.asked[0][1] == wanted


def test_without_flags_the_defaults_are_those_of_the_api(llm: FakeLLM) -> None:
    assert cli.main(["generate", "Once"]) == 0
    assert llm.asked[0][1] == SamplingParams()


def test_ctrl_c_keeps_what_was_written(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class Interrupted(FakeLLM):
        def stream(self, prompt: Any, params: SamplingParams) -> Iterator[str]:
            yield " there"
            signal.raise_signal(signal.SIGINT)
            yield " was"

    monkeypatch.setattr(generate, "open_model", lambda args: Interrupted())
    # Where the tests themselves run in the background of a script, SIGINT was ignored since before Python started.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["generate", "Once"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    captured = capsys.readouterr()
    assert captured.out == "Once there\n"
    assert captured.err == ""


def test_the_environment_names_a_model_too(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("MODEL_CHECKPOINT", "/nowhere/log")
    assert cli.main(["generate", "Once"]) == 2
    assert "/nowhere/log" in capsys.readouterr().err
    assert cli.main(["generate", "/nowhere/else.pt", "Once"]) == 2
    assert "/nowhere/else.pt" in capsys.readouterr().err


def test_the_embedded_model_writes_the_same_with_the_same_seed() -> None:
    """End to end, as a user: streamed or not, the text is one."""
    command = ["-m", "nanogpt", "generate", "Once upon a time", "--seed", "1", "--max-tokens", "12"]
    streamed, whole = python(*command), python(*command, "--json")
    assert streamed.returncode == whole.returncode == 0, streamed.stderr + whole.stderr
    assert streamed.stderr == "", "no progress where there is no terminal"
    assert streamed.stdout == json.loads(whole.stdout)["generated_text"] + "\n"


def test_progress_is_for_terminals_only(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with _arguments._progress("Loading log/"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with _arguments._progress("Loading log/"):
        pass
    assert capsys.readouterr().err == "Loading log/ …\r\x1b[K", "the line is taken back"
