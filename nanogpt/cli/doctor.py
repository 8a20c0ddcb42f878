"""``nanogpt doctor``: what keeps a deployment from being one to rely on, each finding with its remedy."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt._version import __version__
from nanogpt.cli import serve
from nanogpt.errors import InvalidRequest

if TYPE_CHECKING:
    from nanogpt.doctor.checklist import Box
    from nanogpt.doctor.findings import Finding
    from nanogpt.doctor.service import Service

HELP = "check this machine and its settings, or a running service"

_URL = "http://localhost:5000"
_TIMEOUT_S = 60.0
_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}
_MAX_KEY_BYTES = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("doctor")
    group.add_argument(
        "--url", metavar="URL", help="check the service that answers there, through its proxies, not this machine"
    )
    group.add_argument(
        "--checklist",
        action="store_true",
        help=f"tick the deployment guide's eight boxes for the service at --url (default {_URL})",
    )
    group.add_argument("--json", action="store_true", help="print the findings as JSON")
    group.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long an answer of the service may take (default {_TIMEOUT_S:g})",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="file with the API key (default: API_KEY)")
    group.add_argument("--admin-key-file", metavar="FILE", help="file with the admin key (default: ADMIN_KEY)")
    group.add_argument(
        "--allow-plain-http", action="store_true", help="send the keys over plain http to another machine, too"
    )
    serve.add_arguments(parser)
    parser.epilog = (
        "Without --url the settings are those of `nanogpt serve`: flags, environment, settings file. Each finding is\n"
        "ok, warn or fail, with a remedy and the chapter that explains it.\n\n"
        "exit codes: 0 nothing failed (with --checklist: all boxes are ticked), 1 something did, 2 it could not be\n"
        "asked as it was\n\n"
        "examples:\n  nanogpt doctor log/\n  API_KEY=… ADMIN_KEY=… nanogpt doctor --url https://gpt.example.com\n"
        "  nanogpt doctor --checklist --url https://gpt.example.com --api-key-file key"
    )


def run(args: argparse.Namespace) -> int:
    if args.url is None and not args.checklist:
        return _report(args, "this machine", _check_machine(args))
    service = _service(args)
    return _report(args, service.url, _check_service(service))


def _check_machine(args: argparse.Namespace) -> Iterator[Finding]:
    """Raises: SettingsError for settings that cannot even be read."""
    settings = serve.settings_of(args)
    from nanogpt.doctor import checkpoint, configuration, machine
    from nanogpt.doctor.here import Here
    from nanogpt.doctor.readings import read_machine

    here = Here(settings, read_machine(settings.device))
    for check in (*checkpoint.CHECKS, *machine.CHECKS, *configuration.CHECKS):
        yield from check.run(here)


def _check_service(service: Service) -> Iterator[Finding]:
    """What follows depends on /health: who does not answer it is not asked further."""
    from nanogpt.doctor import live, proxy

    first = list(live.health.run(service))
    yield from first
    if any(finding.status == "fail" for finding in first):
        return
    for check in (*(check for check in live.CHECKS if check is not live.health), *proxy.CHECKS):
        yield from check.run(service)


def _service(args: argparse.Namespace) -> Service:
    """Raises: InvalidRequest for what does not go together."""
    given = [*serve.flags_of(args), *(["config"] if args.config is not None else [])]
    if given:
        raise InvalidRequest(
            f"--{given[0].replace('_', '-')} is about this machine, and --url asks a service.",
            remedy="Leave one of them away.",
        )
    from nanogpt.doctor.service import Service

    return Service(
        args.url or _URL,
        api_key=_key(args.api_key_file, "API_KEY"),
        admin_key=_key(args.admin_key_file, "ADMIN_KEY"),
        timeout_s=args.timeout,
        allow_plain_http=args.allow_plain_http,
    )


def _key(path: str | None, variable: str) -> str:
    if path is None:
        return os.environ.get(variable, "")
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(_MAX_KEY_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"Cannot read the key in {path}: {getattr(error, 'strerror', None) or 'no text'}."
        ) from None


def _report(args: argparse.Namespace, subject: str, found: Iterable[Finding]) -> int:
    """Print the findings as they come, and return the exit code."""
    from nanogpt.doctor.checklist import tick

    findings = []
    for finding in found:
        findings.append(finding)
        if not args.json and not args.checklist:
            _print(_lines(finding))
    counts = {status: sum(finding.status == status for finding in findings) for status in _COLOURS}
    boxes = tick(findings) if args.checklist else []
    failed = bool(counts["fail"]) or not all(box.is_ticked for box in boxes)
    if args.json:
        report: dict[str, object] = {"version": __version__, "subject": subject, "counts": counts}
        report |= {"checklist": [box.to_dict() for box in boxes]} if args.checklist else {}
        print(
            json.dumps(report | {"findings": [finding.to_dict() for finding in findings]}, indent=2, ensure_ascii=False)
        )
    elif args.checklist:
        loose = [finding for finding in findings if not any(finding in box.findings for box in boxes)]
        _print([line for box in boxes for line in _box_lines(box)])
        _print([line for finding in loose if finding.status != "ok" for line in _lines(finding)])
        print(f"{sum(box.is_ticked for box in boxes)} of {len(boxes)} boxes are ticked for {subject}.")
    else:
        print(f"{subject}: {counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail.")
    return int(failed)


def _lines(finding: Finding) -> list[str]:
    lines = [f"{_coloured(finding.status)}  {finding.check:<17} {finding.says}"]
    if finding.status != "ok":
        lines += [f"{'':<24}→ {finding.remedy}", f"{'':<26}{finding.see}"]
    return lines


def _box_lines(box: Box) -> list[str]:
    lines = [f"[{'x' if box.is_ticked else ' '}] {box.number} {box.says}"]
    for finding in box.findings:
        lines += [f"      {line}" for line in _lines(finding)]
    return lines if box.findings else [*lines, "      not looked at: the service does not answer"]


def _coloured(status: str) -> str:
    text = f"{status:<4}"
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[{_COLOURS[status]}m{text}\x1b[0m" if in_colour else text


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line, flush=True)
