"""A Ray cluster of the tests' own: one node on loopback that ends with them, and what is served on it.

Everything is asked from outside: by HTTP through Ray's proxy, and by the processes' names.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
from http_support import wait_for

BIN = Path(sys.executable).parent
# Ray starts a dozen processes; on a busy machine each takes many seconds.
START_S = 240.0


def free_port() -> int:
    """One above the range that Ray gives its workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := probe.getsockname()[1]) > 20_000:
                return int(port)


class Cluster:
    """``ray start`` with two CPUs (whatever the machine has), and ``serve run`` on it with a configuration file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        self._environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # nobody else reaches it, and a token would be written to the home folder
            # The name is Ray's: with 0 a node lives on loopback, on every system.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_raylet_start_wait_time_s": str(int(START_S)),
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "OMP_NUM_THREADS": "1",
        }
        self.url = ""

    def start(self) -> None:
        port = self._environment["RAY_ADDRESS"].rpartition(":")[2]
        self._start(
            "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
            "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000",
            f"--temp-dir={self._folder / 'r'}",
        )  # fmt: skip
        self._wait(lambda: "Ray runtime started" in self.log("ray"), "the cluster runs")

    def serve(self, config: str, **environment: str) -> None:
        """``serve run`` of this configuration, until it answers."""
        path = self._folder / "serve.yaml"
        path.write_text(config)
        self._environment.update(environment)
        self._start("serve", "run", str(path))

    def wait_ready(self, url: str) -> None:
        self.url = url

        def ready() -> bool:
            try:
                return requests.get(f"{url}/ready", timeout=10).status_code == 200
            except requests.RequestException:
                return False

        self._wait(ready, "the application answers")

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=300, **kwargs)

    def replica_pids(self) -> set[int]:
        """The processes of this cluster's replicas."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes()
                    # Ray writes the name over the environment, too: whose it is, its parent tells (the raylet).
                    parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                    is_ours = str(self._folder).encode() in Path(f"/proc/{parent}/cmdline").read_bytes()
                    if is_ours and b"ServeReplica" in command and b":Replica" in command:
                        found.add(int(entry.name))
                except OSError:
                    continue
        return found

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self._folder.glob("*.log"))

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def end(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, name: str, *arguments: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [BIN / name, *arguments],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _wait(self, condition: Any, what: str) -> None:
        def held() -> bool:
            for process in self._processes:
                assert process.poll() is None, f"{process.args} has ended: {self._logs()}"
            return bool(condition())

        started = time.monotonic()
        wait_for(held, START_S, what)
        print(f"{what} after {time.monotonic() - started:.1f} s")
