"""``nanogpt serve``: the HTTP API on a checkpoint, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from nanogpt.cli._arguments import add_setting
from nanogpt.errors import SettingsError
from nanogpt.settings import Settings

HELP = "serve a checkpoint over HTTP"

GROUPS = {
    "model_checkpoint": "model",
    "host": "HTTP",
    "max_prompt_chars": "requests",
    "response_cache": "response cache",
    "max_batch_size": "engine",
    "log_format": "logs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for every setting, but for secrets: a command line is seen by everybody on the machine."""
    parser.epilog = (
        "Each setting is also an environment variable and a key of the settings file (docs/settings.md); secrets\n"
        "(API_KEY, REDIS_URL) have no flag.\n\n"
        "examples:\n  nanogpt serve\n  nanogpt serve log/model_40000.pt --port 8080\n"
        "  nanogpt serve log/model_40000.pt --compare-checkpoint log/model_30000.pt\n"
        "  API_KEY=secret nanogpt serve log/ --host 0.0.0.0"
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="a file, or a folder such as log/ (default: the embedded model)",
    )
    parser.add_argument("--config", metavar="FILE", help="settings file (TOML)")
    group: argparse._ArgumentGroup | None = None
    for field in dataclasses.fields(Settings):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        if field.metadata["secret"]:
            continue
        assert group is not None
        add_setting(group, field.name)


def run(args: argparse.Namespace) -> int:
    settings_of(args)  # what is wrong is said before anything is imported
    from nanogpt.web.server import serve

    serve(lambda: settings_of(args))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags, the environment and the file come to. Raises: SettingsError."""
    return Settings.load(flags_of(args), config=args.config)


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags. Raises: SettingsError."""
    flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if not f.metadata["secret"]}
    if args.checkpoint is not None:
        if args.model_checkpoint is not None:
            raise SettingsError(
                "The checkpoint is given twice.", remedy="Leave --model-checkpoint away.", field="model_checkpoint"
            )
        flags["model_checkpoint"] = args.checkpoint
    return {name: value for name, value in flags.items() if value is not None}
