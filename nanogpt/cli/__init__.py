"""The command ``nanogpt``: finds the command's module, runs it, and turns what went wrong into words and an exit code.

A command is a file of this folder: ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args) -> int``. It is
imported only when it is asked for (and for the list of commands), and imports what is heavy inside ``run``, so that
``--help`` answers at once. Files whose names begin with an underscore are shared by commands.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from nanogpt._version import __version__
from nanogpt.errors import InvalidRequest, NanoGPTError

INTERRUPTED = 130  # as a shell says it of a program that SIGINT ended
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; nothing but exit codes and messages comes out of it."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except NanoGPTError as error:
        print(f"nanogpt: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, a pager) has gone. Without this Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SystemExit as exit:  # argparse: 0 after --help, 2 after its own message
        return exit.code if isinstance(exit.code, int) else 1


def command_names() -> list[str]:
    """Every command there is, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def command_parser(name: str) -> tuple[argparse.ArgumentParser, ModuleType]:
    """The parser of one command, and the module whose ``run`` takes what it parses."""
    module = importlib.import_module(f"{__name__}.{name}")
    parser = argparse.ArgumentParser(
        prog=f"nanogpt {name}",
        description=module.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.usage = parser.usage or _usage(parser)
    return parser, module


def _usage(parser: argparse.ArgumentParser) -> str:
    """One line. argparse's own lists every flag before the list of flags, and breaks it differently in every Python."""
    words = [parser.prog, "[OPTIONS]"]
    for action in parser._get_positional_actions():
        choices = "{" + ",".join(map(str, action.choices or ())) + "}"
        name = str(action.metavar or (choices if action.choices else action.dest.upper()))
        words.append({"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name))
    return " ".join(words)


def overview() -> str:
    """What ``nanogpt --help`` prints."""
    names = command_names()
    width = max(map(len, names)) + 2
    helps = [(name, importlib.import_module(f"{__name__}.{name}").HELP) for name in names]
    return "\n".join(
        [
            "usage: nanogpt COMMAND [ARGUMENTS]",
            "",
            "Serve, from the command line or over HTTP, a GPT that you trained yourself.",
            "",
            "commands:",
            *(f"  {name:<{width}}{help}" for name, help in helps),
            "",
            "options:",
            "  -h, --help     show this, or with a command: its arguments",
            "  --version      show the version",
        ]
    )


def _dispatch(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("--version", "-V"):
        print(f"nanogpt {__version__}")
        return 0
    names = command_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        what = "option" if name.startswith("-") else "command"
        raise InvalidRequest(
            f"There is no {what} {name!r}.",
            remedy=f"Did you mean {close[0]}?" if close else "nanogpt --help lists the commands.",
        )
    parser, module = command_parser(name)
    return int(module.run(parser.parse_args(argv[1:])))
