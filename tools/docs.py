"""Write the generated pages, docs/settings.md and docs/cli.md, or with --check fail where they lag behind the code.

The settings page comes from the metadata of nanogpt.settings, the command line's from what ``--help`` prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from nanogpt import cli
from nanogpt.cli.serve import GROUPS
from nanogpt.settings import Settings

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- Written by `make docs` from the code; change it there. -->"

OTHER_VARIABLES = {
    "NANOGPT_CONFIG": "The settings file, as `--config` names it.",
    "NANOGPT_CACHE_DIR": "Where the CPU runner keeps packed weights, so that the next start maps them; `off`: nowhere."
    " Default: `nanogpt/` in the user's cache folder.",
    "NANOGPT_ISA": "Forces an instruction set of the CPU runner, for tests: the results are the same on all of them.",
}


def settings_page() -> str:
    """Every setting: its key, variable and flag, its default, its limits, what it does."""
    lines = [
        "# Settings",
        "",
        NOTE,
        "",
        "A setting is taken from the first of these that has it: a flag of `nanogpt serve`, an environment variable,",
        "the settings file, the default. The file is TOML with the keys below (`nanogpt serve --config FILE`, or",
        "`NANOGPT_CONFIG=FILE`). An unknown flag, key or variable that begins with `NANOGPT_` is an error that names",
        "the nearest one there is: a typing mistake never becomes a default. Units are in the names: `_s` is seconds.",
        "",
        "Each setting stands here with its key, its variable and its flag. Secrets have no flag: `ps` would show it.",
    ]
    for field in dataclasses.fields(Settings):
        data = field.metadata
        if field.name in GROUPS:
            title = GROUPS[field.name]
            lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
            lines += ["| setting | default | admitted | what it does |", "|---|---|---|---|"]
        if data["choices"]:
            admitted = ", ".join(f"`{choice}`" for choice in data["choices"])
        elif data["low"] is not None:
            admitted = f"{_number(data['low'])} to {_number(data['high'])}"
        else:
            admitted = {"bool": "`true`, `false`"}.get(str(field.type), "text")
        default = "empty" if field.default == "" else f"`{str(field.default).lower()}`"
        names = [f"`{field.name}`", f"`{data['env']}`"]
        if not data["secret"]:
            names.append(f"`--{field.name.replace('_', '-')}`")
        row = ("<br>".join(names), default, admitted, data["help"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    lines += [
        "",
        "## Variables that are no settings",
        "",
        "| variable | what it does |",
        "|---|---|",
        *(f"| `{name}` | {what} |" for name, what in OTHER_VARIABLES.items()),
    ]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """What every command prints for --help."""
    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"
    parts = ["# Command line", NOTE, _console("nanogpt --help", cli.overview())]
    for name in cli.command_names():
        parser, _ = cli.command_parser(name)
        parts += [f"## nanogpt {name}", _console(f"nanogpt {name} --help", parser.format_help())]
        for action in parser._get_positional_actions():
            if isinstance(action, argparse._SubParsersAction):
                parts += [_console(f"{kind.prog} --help", kind.format_help()) for kind in action.choices.values()]
    parts.append(
        "## Exit codes\n\n"
        "| code | meaning |\n|---|---|\n"
        "| 0 | done |\n"
        "| 1 | an error of the server or the engine |\n"
        "| 2 | what was asked cannot be done as it was asked: an argument, a setting, a checkpoint |\n"
        "| 130 | ended by Ctrl-C |\n"
        "| 141 | the reader of the output has gone |"
    )
    return "\n\n".join(parts) + "\n"


def _console(command: str, output: str) -> str:
    return f"```console\n$ {command}\n{output.rstrip()}\n```"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    lagging = []
    for name, page in (("settings.md", settings_page()), ("cli.md", cli_page())):
        path = DOCS / name
        if path.exists() and path.read_text(encoding="utf-8") == page:
            continue
        lagging.append(f"docs/{name}")
        if not check:
            path.write_text(page, encoding="utf-8")
    if lagging and check:
        print(f"{' and '.join(lagging)} lag behind the code: run `make docs` and commit what it writes.")
        return 1
    print(f"docs: {'wrote ' + ', '.join(lagging) if lagging else 'in step with the code'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
