"""deploy/systemd under a real systemd: installed by the documentation's own commands, and in its sandbox.

It has to start, reload, survive its engine and stop there as it does outside, and may do nothing else.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
from http_support import ENDLESS, ENDLESS_BODY, START_S, read_events, wait_for
from nginx_support import free_port
from support import ROOT, require_service
from systemd_support import LOG, Systemd, install_package

pytestmark = pytest.mark.services

UNIT = "nano-gpt-api.service"
KEY = {"X-API-Key": "secret"}


def documented() -> list[str]:
    """The commands of the chapter on systemd, but for those that fetch packages."""
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    found = re.search(r"^### systemd\n.*?^```bash\n(.*?)^```$", text, re.M | re.S)
    assert found
    lines = [line for line in found[1].splitlines() if line and not line.startswith("#")]
    return [line for line in lines if "python3 -m venv" not in line and "/pip install" not in line]


class Service:
    """The unit as the documentation installs it, with a key, a port and endless texts."""

    def __init__(self, systemd: Systemd) -> None:
        self.systemd = systemd
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        install_package(systemd)
        *install, start = documented()
        assert start.startswith("systemctl enable --now")
        for command in install:
            systemd.run("sh", "-c", f"cd {ROOT} && {command}")
        self.environment = systemd.path("/etc/nano-gpt-api/env")
        self.settings = systemd.path("/etc/nano-gpt-api/settings.toml")
        assert re.search("^API_KEY=[0-9a-f]{64}$", self.environment.read_text(), re.M), "the documentation sets a key"
        more = {"API_KEY": "secret", "MODEL_CHECKPOINT": "", "OMP_NUM_THREADS": "1", "PORT": str(port), **ENDLESS}
        with self.environment.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in more.items())
        systemd.run("sh", "-c", start)

    @property
    def log(self) -> str:
        return self.systemd.path(LOG).read_text(encoding="utf-8")

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers=KEY, timeout=30)

    def generate(self, body: dict[str, Any], **options: Any) -> requests.Response:
        return requests.post(f"{self.url}/generate", json=body, headers=KEY, timeout=60, **options)

    def show(self, name: str) -> str:
        return self.systemd.show(UNIT, name)

    def pids(self) -> dict[int, str]:
        return self.systemd.pids(UNIT)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    systemd = Systemd(tmp_path_factory.mktemp("systemd"))
    try:
        yield Service(systemd)
    finally:
        systemd.end()
        print(systemd.log)


def test_it_is_started_once_it_answers(service: Service) -> None:
    """``systemctl start`` returned, and there was nothing to wait for; enabled for the next boot, too."""
    assert service.get("/health").json()["status"] == "healthy"
    assert requests.get(f"{service.url}/model_info", timeout=30).status_code == 401
    assert service.generate({"prompt": "To be", "max_length": 3}).status_code == 200
    assert (service.show("ActiveState"), service.show("UnitFileState")) == ("active", "enabled")


def test_everything_lies_in_its_folders(service: Service) -> None:
    owner = int(service.systemd.run("id", "-u", "nano-gpt-api").stdout)
    folders = {"/run/nano-gpt-api": 0o700, "/var/cache/nano-gpt-api": 0o700, "/var/lib/nano-gpt-api": 0o750}
    for folder, mode in folders.items():
        found = service.systemd.path(folder).stat()
        assert (found.st_uid, found.st_mode & 0o777) == (owner, mode), folder
    assert (service.systemd.path("/run/nano-gpt-api") / "control.sock").is_socket()
    if find_spec("nanogpt._kernels"):
        assert list(service.systemd.path("/var/cache/nano-gpt-api").glob("*.packed")), "the next start maps the weights"


def test_every_process_is_confined(service: Service) -> None:
    """Nobody's rights, a filter for system calls, and nothing to write to but its own folders."""
    pids = service.pids()
    assert any("engine.process" in command for command in pids.values())
    for pid, command in pids.items():
        status = dict(re.findall(r"^(\w+):\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M))
        confined = (int(status["CapBnd"], 16), int(status["CapEff"], 16), status["NoNewPrivs"], status["Seccomp"])
        assert confined == (0, 0, "1", "2"), command
        assert "0" not in status["Uid"].split()
    mounts = Path(f"/proc/{next(iter(pids))}/mountinfo").read_text().splitlines()
    options = {fields[4]: fields[5].split(",") for fields in map(str.split, mounts)}
    assert "ro" in options["/"]
    assert "rw" in options["/run/nano-gpt-api"]
    assert "rw" in options["/var/cache/nano-gpt-api"]
    assert not list(Path(f"/proc/{next(iter(pids))}/root/home").iterdir())


def test_reload_reads_the_settings_again_and_cuts_no_stream(service: Service) -> None:
    main = service.show("MainPID")
    with service.generate({**ENDLESS_BODY, "stream": True}, stream=True) as answer:
        events = read_events(answer)
        assert next(events)[1]["text"]
        with service.settings.open("a") as file:
            file.write("max_prompt_chars = 3\n")
        service.systemd.systemctl("reload", UNIT)
        long = {"prompt": "To be", "max_length": 1}
        wait_for(lambda: service.generate(long).status_code == 400, START_S, "the setting takes effect")
        assert [next(events)[0] for _ in range(50)] == ["message"] * 50
    assert service.show("MainPID") == main
    assert service.show("ActiveState") == "active"


def test_a_killed_engine_comes_back_and_the_service_goes_on(service: Service) -> None:
    main = service.show("MainPID")

    def engines() -> set[int]:
        return {pid for pid, command in service.pids().items() if "engine.process" in command}

    [killed] = engines()
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: engines() - {killed}, START_S, "another one is started")
    wait_for(lambda: service.get("/ready").status_code == 200, START_S, "it is ready")
    assert (service.show("MainPID"), service.show("NRestarts"), service.show("OOMPolicy")) == (main, "0", "continue")


def test_systemd_analyze_agrees(service: Service) -> None:
    """No word from verify; and the exposure is the documentation's (systemd's own scale: 10 is worst)."""
    require_service("systemd-analyze", os.path.exists("/usr/bin/systemd-analyze"), "it comes with systemd")
    verified = service.systemd.run("systemd-analyze", "verify", f"/etc/systemd/system/{UNIT}")
    assert not verified.stderr.strip()
    gpu = "/etc/systemd/system/gpu.service"
    place = f"cp deploy/systemd/{UNIT} {gpu} && install -D -m 644 deploy/systemd/gpu.conf {gpu}.d/gpu.conf"
    service.systemd.run("sh", "-c", f"cd {ROOT} && {place}")
    assert not service.systemd.run("systemd-analyze", "verify", gpu).stderr.strip()
    told = {page: re.search(r"\b(\d\.\d)\b[^\n]*systemd-analyze|systemd-analyze security[^\n]*?\b(\d\.\d)\b", text)
            for page in ("docs/deployment.md", "docs/zh/deployment.md")
            for text in [(ROOT / page).read_text(encoding="utf-8")]}  # fmt: skip
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(ROOT / "deploy" / "systemd" / UNIT)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    exposure = re.search(r"Overall exposure level for .*: (\d\.\d)", shown)
    assert exposure
    for page, found in told.items():
        assert found, page
        assert exposure[1] in found.groups(), page


def test_the_log_is_json(service: Service) -> None:
    """As settings.example.toml has it: one object a line, which journald keeps."""
    messages = [json.loads(line)["message"] for line in service.log.splitlines()]
    assert any(message.startswith("Serving") for message in messages)


def test_a_wrong_setting_ends_it_once_and_a_stop_lets_texts_finish(service: Service) -> None:
    """Last of all. The text that runs ends by itself; what the setting was is in the log; nothing is tried again."""
    body = {"prompt": "To", "max_length": 290, "seed": 3, "stream": True, "cache": False}
    with ThreadPoolExecutor() as pool, service.generate(body, stream=True) as answer:
        events = read_events(answer)
        next(events)
        stop = pool.submit(service.systemd.systemctl, "stop", UNIT)
        [*_, (_, last)] = events
        stop.result()
    assert last["tokens_generated"] == 290
    assert (service.show("Result"), service.show("ExecMainStatus")) == ("success", "0")
    assert not service.pids()
    assert not service.systemd.path("/run/nano-gpt-api").exists()

    with service.settings.open("a") as file:
        file.write("max_promt_chars = 3\n")
    assert service.systemd.systemctl("start", UNIT, check=False).returncode != 0
    assert (service.show("ExecMainStatus"), service.show("NRestarts")) == ("2", "0")
    assert service.show("ActiveState") == "failed"
    assert "max_promt_chars" in service.log.splitlines()[-1]
