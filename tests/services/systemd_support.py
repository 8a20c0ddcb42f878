"""A real systemd: process 1 of namespaces of its own, with no unit but what a test installs.

/etc, /opt and /var are laid over the machine's, so that installation commands can be run as they are documented and
leave nothing behind. The network is the machine's: tests reach on loopback what systemd has started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from http_support import START_S, wait_for
from support import ROOT, require_service

LOG = "/var/log/nano-gpt-api.log"
_SYSTEMD = "/lib/systemd/systemd"
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
# In the mount namespace, before systemd. Nothing of the machine's own systemd is to be seen.
_PREPARE = f"""
set -eu
mount -t tmpfs none "$1"; cd "$1"
for name in etc opt var; do
    mkdir -p up/$name work/$name
    mount -t overlay -o lowerdir=/$name,upperdir=$1/up/$name,workdir=$1/work/$name overlay /$name
done
mkdir -p /etc/systemd/system; mount -t tmpfs none /etc/systemd/system
for name in tests sysinit basic multi-user shutdown network-online; do
    printf '[Unit]\\nDefaultDependencies=no\\n' > /etc/systemd/system/$name.target
done
mkdir cgroup; mount -t cgroup2 none cgroup
if mountpoint -q /sys/fs/cgroup; then umount -R /sys/fs/cgroup; fi
mount --bind cgroup /sys/fs/cgroup
mount -t tmpfs -o mode=755 none /run; mkdir /run/systemd
exec env -i container=tests PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/etc/systemd/system \\
    {_SYSTEMD} --unit=tests.target --log-target=console --show-status=no
"""


class Systemd:
    """``run`` runs a command where systemd runs."""

    def __init__(self, folder: Path) -> None:
        require_service("systemd", os.path.exists(_SYSTEMD), "make services installs it")
        self._group = _control_group()
        self._root = folder / "root"
        self._root.mkdir()
        self.log_path = folder / "log"
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--pid", "--fork", "--mount", "--cgroup", "--uts", "--ipc", "--mount-proc",
                 "--kill-child=KILL", "sh", "-c", _PREPARE, "sh", str(self._root)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=self._enter,
            )  # fmt: skip
        self._pid = 0
        wait_for(self._is_up, START_S, "systemd is up")

    def _enter(self) -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        (self._group / "cgroup.procs").write_text("0")

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self.log
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return False
        self._pid = int(children[0])
        if b"systemd" not in Path(f"/proc/{self._pid}/cmdline").read_bytes().partition(b"\0")[0]:
            return False
        return self.systemctl("is-active", "tests.target", check=False).stdout == "active\n"

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "--target", str(self._pid), "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--wd=/"]
        result = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0 or not check, f"{command}: {result.stdout}{result.stderr}\n{self.log}"
        return result

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("env", "SYSTEMD_UNIT_PATH=/etc/systemd/system", "systemctl", *words, check=check)

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "--value", "--property", name, unit).stdout.strip()

    def path(self, path: str) -> Path:
        """A file as systemd sees it."""
        return Path(f"/proc/{self._pid}/root{path}")

    def pids(self, unit: str) -> dict[int, str]:
        """The living processes of a unit, as this machine numbers them: pid → command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"/{unit}\n" in (folder / "cgroup").read_text():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def end(self) -> None:
        self._process.kill()  # takes process 1 with it, and that one everything else
        self._process.wait()
        groups = sorted(self._group.rglob("*/"), reverse=True)
        for group in [*filter(Path.is_dir, groups), self._group]:
            wait_for(partial(_removed, group), START_S, f"{group} is empty")


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def _control_group() -> Path:
    """A new control group, or a skip where this user may not make one, nor namespaces."""
    probe = subprocess.run(["unshare", "--pid", "--fork", "--mount", "--cgroup", "true"], capture_output=True)
    if os.getuid() != 0 or probe.returncode != 0:
        pytest.skip("systemd as process 1 of a namespace needs root, and a kernel and a container that let it")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("there is no cgroup2 to write to")
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    group = root / own[3:].strip("/") / f"nanogpt-tests-{os.getpid()}"
    group.mkdir()
    return group


def install_package(systemd: Systemd) -> None:
    """What ``python3 -m venv /opt/nano-gpt-api`` and ``pip install`` make: here a door to this checkout.

    The unit hides homes and /tmp, where a checkout or its Python may well be: just those are shown to it again.
    """
    script = systemd.path("/opt/nano-gpt-api/bin/nanogpt")
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH={ROOT}\nexec {sys.executable} -m nanogpt "$@"\n')
    script.chmod(0o755)
    needed = {str(ROOT), sys.prefix, sys.base_prefix, *(path for path in sys.path if os.path.isdir(path))}
    hidden = [path for path in sorted(needed) if path.startswith(("/home/", "/root/", "/tmp/", "/var/tmp/"))]
    lines = ["[Service]", f"StandardOutput=append:{LOG}", "StandardError=inherit"]  # there is no journal
    if hidden:
        lines += ["ProtectHome=tmpfs", f"BindReadOnlyPaths={' '.join(hidden)}"]
    drop_in = systemd.path("/etc/systemd/system/nano-gpt-api.service.d/tests.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("\n".join(lines) + "\n")
