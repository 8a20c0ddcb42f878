"""`make serve` limits nobody on loopback, where there is nobody else, and says so; elsewhere the default holds."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT, require_service


@pytest.mark.parametrize(
    ("environment", "rate_limit"),
    [
        ({}, "off"),
        ({"HOST": "127.0.0.1"}, "off"),
        ({"HOST": "127.1.2.3"}, "off"),
        ({"HOST": "localhost"}, "off"),
        ({"HOST": "::1"}, "off"),
        ({"HOST": ""}, "off"),
        ({"RATE_LIMIT": "3 per hour"}, "3 per hour"),
        ({"HOST": "0.0.0.0"}, "unset"),
        ({"HOST": "192.168.1.5", "RATE_LIMIT": "off"}, "off"),
    ],
)
def test_the_limit_of_make_serve(tmp_path: Path, environment: dict[str, str], rate_limit: str) -> None:
    require_service("make", shutil.which("make") is not None, "every Linux has it")
    (tmp_path / "python").write_text("#!/bin/sh\necho ${RATE_LIMIT-unset} $*\n")
    (tmp_path / "python").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("HOST", "RATE_LIMIT", "MAKEFLAGS")}
    command = ["make", "-s", "-o", "install", "serve", f"BIN={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == f"{rate_limit} -m web.serve", result.stderr
