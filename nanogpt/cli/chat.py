"""``nanogpt chat``: a conversation in the terminal, in the format that the checkpoint was taught or as a transcript."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.cli._arguments import add_model_arguments, add_sampling_arguments, open_model, parse_field, sampling_params
from nanogpt.errors import InvalidRequest, NanoGPTError
from nanogpt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanogpt.llm import LLM

HELP = "talk with a model in the terminal"

_PLAIN_FIELDS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty",
                 "presence_penalty", "frequency_penalty")  # fmt: skip
_COMMANDS = f"""\
  /help             this list
  /reset            forget the conversation; /system stays
  /system TEXT      what the model is told first; without TEXT: nothing
  /NAME VALUE       set one of: {", ".join(_PLAIN_FIELDS[:6])},
                    {", ".join(_PLAIN_FIELDS[6:])}; /seed off: a new one each time
  /show             the settings, and how much of the context is in use
  /exit             leave (or Ctrl-D)
A line that ends with \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "In the conversation:\n" + _COMMANDS
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT",
        help="a file or a folder (default: MODEL_CHECKPOINT from the environment, or the embedded model)",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", default="", help="what the model is told first")
    add_sampling_arguments(parser, leave_out=("logprobs", "prompt_logprobs"))
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    conversation = Conversation(open_model(args), sampling_params(args), args.system)
    read = _terminal_reader() if sys.stdin.isatty() else _pipe_reader()
    if sys.stdin.isatty():
        print("/help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            text = read_message(read)
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        try:
            if text.startswith("/"):
                said = command(conversation, text)
                if said is None:
                    break
                print(said)
            elif text.strip():
                with suppress(KeyboardInterrupt), closing(conversation.answer(text)) as pieces:
                    for piece in pieces:
                        print(piece, end="", flush=True)
                print(flush=True)
        except NanoGPTError as error:
            print(f"error: {error}", file=sys.stderr)
    if sys.stdin.isatty():
        print()
    return 0


class Conversation:
    """What was said, and how the model goes on with it. ``params`` and ``system`` may be changed between answers."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str = "") -> None:
        from nanogpt.chat_template import PLAIN, PLAIN_STOPS

        self.llm = llm
        self.params = params
        self.system = system
        self.messages: list[dict[str, str]] = []
        self._template = llm.chat_template or PLAIN
        self._stops = () if llm.chat_template else PLAIN_STOPS

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to the text, piece by piece. What was given out before an interruption is remembered."""
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._fit()
            params = dataclasses.replace(self.params, stop=(*self.params.stop, *self._stops))
            pieces = self.llm.stream(prompt, params)
        except NanoGPTError:
            self.messages.pop()
            raise
        said = ""
        try:
            for piece in pieces:
                piece = piece if said else piece.lstrip()
                said += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said.strip()})

    def prompt_token_ids(self) -> list[int]:
        """The conversation as the model reads it, up to where the next answer begins."""
        from nanogpt.chat_template import render

        system = [{"role": "system", "content": self.system}] if self.system else []
        tokenizer = self.llm.tokenizer
        end_of_text = "" if tokenizer.eos_token_id is None else tokenizer.decode([tokenizer.eos_token_id])
        text = render(self._template, system + self.messages, end_of_text=end_of_text)
        # The template's own special tokens count; whoever types one here plays with their own model.
        return tokenizer.encode(text, allow_special=True)

    def _fit(self) -> list[int]:
        """The prompt, after the oldest turns were forgotten that leave no room for an answer."""
        block_size = self.llm.config.block_size
        room = block_size - min(self.params.max_tokens, block_size // 2)
        while len(prompt := self.prompt_token_ids()) > room and len(self.messages) > 2:
            del self.messages[:2]
        return prompt


def command(conversation: Conversation, line: str) -> str | None:
    """Carry out a line that begins with a slash; what to print, or None to leave."""
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    if name in ("exit", "quit", "bye"):
        return None
    if name == "help":
        return _COMMANDS
    if name == "reset":
        conversation.messages.clear()
        return "The conversation is forgotten."
    if name == "system":
        conversation.system = rest
        return f"The model is told first: {rest}" if rest else "The model is told nothing first."
    if name == "show":
        params = conversation.params
        used, block_size = len(conversation.prompt_token_ids()), conversation.llm.config.block_size
        lines = [f"{field} {getattr(params, field)}" for field in _PLAIN_FIELDS]
        return "\n".join([*lines, f"context {used} of {block_size} tokens"])
    if name in _PLAIN_FIELDS:
        if not rest:
            return f"{name} {getattr(conversation.params, name)}"
        conversation.params = dataclasses.replace(conversation.params, **{name: parse_field(name, rest)})
        return f"{name} {getattr(conversation.params, name)}"
    raise InvalidRequest(f"There is no command /{name}.", remedy="/help lists them.")


def read_message(read: Callable[[str], str]) -> str:
    """One message: a line, lines that end with a backslash, or what stands between two lines of three quotes."""
    line = read("> ")
    if line.strip().startswith('"""'):
        lines = [line.strip()[3:]]
        while not lines[-1].rstrip().endswith('"""') or (len(lines) == 1 and not lines[0].strip()):
            lines.append(read("… "))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read("… "))
    return "\n".join(lines)


def _pipe_reader() -> Callable[[str], str]:
    def read(prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read


def _terminal_reader() -> Callable[[str], str]:
    """``input`` with line editing and a history that outlives the process, where the machine has them."""
    with suppress(ImportError):
        import atexit
        import readline

        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nanogpt"
        history = folder / "chat_history"
        with suppress(OSError):
            readline.read_history_file(history)
        readline.set_history_length(1000)

        def save() -> None:
            with suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                readline.write_history_file(history)
                history.chmod(0o600)  # it holds what was said

        atexit.register(save)
    return input
