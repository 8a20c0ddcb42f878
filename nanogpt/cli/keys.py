"""``nanogpt keys``: who may use the server, beside the holder of ``API_KEY``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.errors import InvalidRequest, SettingsError

if TYPE_CHECKING:
    from nanogpt.keys import Key

HELP = "add, list and revoke the keys of clients"
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "add prints the new key, once; the file keeps only its SHA-256. A running server follows the file within a\n"
        "second. The limits hold for this key alone; without --requests-per-minute RATE_LIMIT does.\n\n"
        "examples:\n  nanogpt keys add alice --file keys.json --requests-per-minute 60 --tokens-per-minute 20000\n"
        "  nanogpt keys list --file keys.json\n  nanogpt keys revoke alice --file keys.json\n"
        "  nanogpt serve --keys-file keys.json"
    )
    parser.add_argument("action", choices=("add", "list", "revoke"), help="what to do")
    parser.add_argument("name", nargs="?", metavar="NAME", help="whose key: letters, digits and ._@-")
    parser.add_argument("--file", metavar="FILE", help="the keys file (default: NANOGPT_KEYS_FILE, or the setting)")
    parser.add_argument("--config", metavar="FILE", help="settings file (TOML) that names the keys file")
    group = parser.add_argument_group("limits of a new key")
    group.add_argument("--requests-per-minute", type=int, metavar="N", help="instead of RATE_LIMIT")
    group.add_argument("--tokens-per-minute", type=int, metavar="N", help="of prompts and answers (default: no limit)")
    group.add_argument("--max-concurrency", type=int, metavar="N", help="texts at once (default: no limit)")


def run(args: argparse.Namespace) -> int:
    from nanogpt import keys

    limits = {name: getattr(args, name) for name in _LIMITS}
    for name, value in limits.items():
        if value is not None and (args.action != "add" or not 1 <= value <= keys.MAX_LIMIT):
            flag = "--" + name.replace("_", "-")
            rule = f"between 1 and {keys.MAX_LIMIT:,}" if args.action == "add" else "left away: only add takes limits"
            raise InvalidRequest(f"{flag} is {value}; it must be {rule}.", field=name)
    if (args.name is None) != (args.action == "list"):
        does = "takes no NAME" if args.name else "needs a NAME"
        raise InvalidRequest(f"nanogpt keys {args.action} {does}.", field="name")
    path = _path(args)
    if args.action == "add":
        key = keys.add_key(path, args.name, limits)
        print(f"The key of {args.name}, which is not shown again:", file=sys.stderr)
        print(key)
    elif args.action == "revoke":
        keys.revoke_key(path, args.name)
        print(f"The key of {args.name} is revoked.")
    else:
        _print(keys.read_keys(path))
    return 0


def _path(args: argparse.Namespace) -> Path:
    from nanogpt.settings import Settings

    path = args.file or Settings.load(config=args.config).keys_file
    if not path:
        raise SettingsError("No keys file is set.", remedy="Give --file FILE, or set NANOGPT_KEYS_FILE.", field="file")
    return Path(path)


def _print(keys: list[Key]) -> None:
    rows: list[tuple[str, ...]] = [("NAME", "CREATED", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENCY")]
    rows += [(key.name, key.created, *(str(getattr(key, name) or "-") for name in _LIMITS)) for key in keys]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
