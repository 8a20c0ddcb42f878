"""Protects operators: what deploy/ says about the server is what the server is.

Numbers that stand in a proxy's, systemd's or Kubernetes' files as well as in a setting are compared; Kubernetes'
objects are held to the API's own schemas; names that point from one file to another lead somewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from http_support import START_S, wait_for
from support import ROOT, require_service

from nanogpt.settings import Settings
from nanogpt.web.gunicorn_hooks import configuration
from nanogpt.web.operations import OPERATIONS

NGINX, SYSTEMD, KUBERNETES = (ROOT / "deploy" / name for name in ("nginx", "systemd", "kubernetes"))
BASE = KUBERNETES / "base"
DEFAULTS = Settings()
VERSIONS = ["1.29", "1.36"]
# Kinds that are no part of Kubernetes: their schemas come with what brings them.
FOREIGN = {"PodMonitor", "Kustomization"}


def seconds(text: str) -> float:
    """Of nginx or systemd."""
    number, unit = re.fullmatch(r"(\d+)\s*(ms|s|m|h|)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600}[unit]


def bytes_of(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([km]?)", text.lower()).groups()  # type: ignore[union-attr]
    return int(number) << {"": 0, "k": 10, "m": 20}[unit]


def longest_answer_s(settings: Settings) -> float:
    """From a request to its last byte."""
    return settings.engine_wait_s + settings.request_timeout_s


def last_exit_s(settings: Settings) -> float:
    """From SIGTERM to the end: gunicorn's time for workers, and five seconds for the supervisor."""
    return float(configuration(settings)["graceful_timeout"]) + 5


# -- nginx --------------------------------------------------------------------------------------------------------


def directive(file: str, name: str) -> str:
    text = re.sub(r"#.*", "", (NGINX / "nano-gpt-api" / file).read_text(encoding="utf-8"))
    [value] = re.findall(rf"^\s*{name} ([^;]+);", text, re.M)
    assert isinstance(value, str)
    return value


def test_nginx_agrees_with_the_settings() -> None:
    assert directive("upstream.conf", "server").split()[0] == f"{DEFAULTS.host}:{DEFAULTS.port}"
    assert bytes_of(directive("server.conf", "client_max_body_size")) == DEFAULTS.max_body_bytes
    assert bytes_of(directive("server.conf", "client_body_buffer_size")) >= DEFAULTS.max_body_bytes
    assert seconds(directive("server.conf", "proxy_read_timeout")) > longest_answer_s(DEFAULTS)
    assert seconds(directive("upstream.conf", "keepalive_timeout")) < configuration(DEFAULTS)["keepalive"]


# -- systemd ------------------------------------------------------------------------------------------------------


def unit(name: str) -> dict[str, str]:
    lines = (SYSTEMD / name).read_text(encoding="utf-8").splitlines()
    return {key: value for line in lines if line[:1].isalpha() for key, _, value in [line.partition("=")]}


def test_the_unit_agrees_with_the_settings() -> None:
    values = unit("nano-gpt-api.service")
    assert seconds(values["TimeoutStopSec"]) > last_exit_s(DEFAULTS)
    variables = dict(pair.split("=") for pair in values["Environment"].split())
    assert variables["NANOGPT_RUN_DIR"] == f"/run/{values['RuntimeDirectory']}"
    assert variables.pop("NANOGPT_CACHE_DIR") == f"/var/cache/{values['CacheDirectory']}"
    Settings.load(environ=variables)
    connections = configuration(DEFAULTS)["worker_connections"]
    assert int(values["LimitNOFILE"]) > 4 * connections


def test_the_examples_of_systemd_are_settings() -> None:
    example = (SYSTEMD / "env.example").read_text(encoding="utf-8")
    environ = dict(re.findall(r"^#? ?([A-Z_]+)=(.*)$", example, re.M))
    assert environ.pop("NANOGPT_CONFIG") == "/etc/nano-gpt-api/settings.toml"
    path = SYSTEMD / "settings.example.toml"
    settings = Settings.load(environ=environ, config=str(path))
    assert settings.trusted_proxies == 1
    known = set(Settings.__dataclass_fields__)
    assert set(re.findall(r"^(?:# )?(\w+) = ", path.read_text(encoding="utf-8"), re.M)) <= known


# -- Kubernetes -----------------------------------------------------------------------------------------------------


def load(path: Path) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]


@cache
def base() -> dict[tuple[str, str], dict[str, Any]]:
    """The base's objects, by kind and name."""
    [kustomization] = load(BASE / "kustomization.yaml")
    named = {BASE / name for name in kustomization["resources"]}
    assert named == set(BASE.glob("*.yaml")) - {BASE / "kustomization.yaml"}, "every file is a resource"
    return {(item["kind"], item["metadata"]["name"]): item for path in sorted(named) for item in load(path)}


def example(name: str, kind: str) -> dict[str, Any]:
    return next(item for item in load(KUBERNETES / "examples" / name) if item.get("kind") == kind)


def pod(name: str) -> dict[str, Any]:
    found: dict[str, Any] = base()["Deployment", name]["spec"]["template"]
    return found


def configured() -> Settings:
    """What the base's server is configured with; a variable that the server does not know is refused."""
    secret = example("secret.yaml", "Secret")["stringData"]
    environ = dict(base()["ConfigMap", "nano-gpt-api"]["data"])
    environ.pop("NANOGPT_CACHE_DIR")
    return Settings.load(environ=environ | secret)


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted([*BASE.glob("*.yaml"), *(KUBERNETES / "examples").glob("*.yaml")]):
        for item in load(path):
            # Values of a chart are no object, and a patch is only a part of one.
            if item.get("kind", "Kustomization") not in FOREIGN and path.name != "checkpoint-from-image.yaml":
                yield f"{path.stem}:{item['kind']}:{item['metadata']['name']}", item


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("item", [pytest.param(item, id=name) for name, item in objects()])
def test_kubernetes_would_take_it(item: dict[str, Any], version: str) -> None:
    """By the schemas of its API, in which an unknown field is an error."""
    kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("folder", ["base", "overlays/gpu", "with-checkpoint-from-image"])
def test_kustomize_builds_what_kubernetes_would_take(folder: str, tmp_path: Path) -> None:
    """Overlays and patches, too, which are objects only when they are built."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here; the objects of the base are validated without it")
    source = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, source)
    if folder == "with-checkpoint-from-image":
        (source / folder).mkdir()
        shutil.copy(source / "examples" / "checkpoint-from-image.yaml", source / folder)
        kustomization = {"resources": ["../base"], "patches": [{"path": "checkpoint-from-image.yaml"}]}
        (source / folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    result = subprocess.run(["kubectl", "kustomize", folder], cwd=source, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    built = [item for item in yaml.safe_load_all(result.stdout) if item]
    assert len(built) == len(base())
    for item in built:
        kubernetes_validate.validate(item, VERSIONS[-1], strict=True)
    [server] = [item for item in built if item["kind"] == "Deployment" and item["metadata"]["name"] == "nano-gpt-api"]
    spec = server["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert ("emptyDir" in volumes["checkpoints"]) == (folder == "with-checkpoint-from-image")
    assert ("nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]) == (folder == "overlays/gpu")


def test_kubernetes_agrees_with_the_settings() -> None:
    settings, spec = configured(), pod("nano-gpt-api")["spec"]
    [server] = spec["containers"]
    assert server["ports"] == [{"name": "http", "containerPort": settings.port}]
    assert pod("nano-gpt-api")["metadata"]["annotations"]["prometheus.io/port"] == str(settings.port)
    ports = {
        port["port"] for rule in base()["NetworkPolicy", "nano-gpt-api"]["spec"]["ingress"] for port in rule["ports"]
    }
    assert ports == {settings.port}
    # No answer that has begun is cut when a pod goes.
    assert settings.drain_timeout_s > longest_answer_s(settings)
    before = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > before + last_exit_s(settings)
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert mounts[settings.model_checkpoint]["readOnly"]
    assert mounts[str(Path(settings.run_dir).parent)]
    assert mounts[base()["ConfigMap", "nano-gpt-api"]["data"]["NANOGPT_CACHE_DIR"]]
    assert settings.trusted_proxies == 1


def test_the_ingress_agrees_with_the_settings() -> None:
    annotations = {
        name.rpartition("/")[2]: value
        for name, value in example("ingress.yaml", "Ingress")["metadata"]["annotations"].items()
    }
    assert bytes_of(annotations["proxy-body-size"]) == configured().max_body_bytes
    assert seconds(annotations["proxy-read-timeout"]) > longest_answer_s(configured())
    assert annotations["proxy-buffering"] == "off"
    assert annotations["limit-connections"] == directive("server.conf", "limit_conn").split()[1]


def test_the_ingress_has_every_route_but_two() -> None:
    [rule] = example("ingress.yaml", "Ingress")["spec"]["rules"]
    paths = {path["path"]: path["pathType"] for path in rule["http"]["paths"]}

    def is_there(route: str) -> bool:
        parents = ["/".join(route.split("/")[: n + 1]) for n in range(1, route.count("/") + 1)]
        return route in paths or any(paths.get(parent) == "Prefix" for parent in parents)

    hidden = {operation.path for operation in OPERATIONS if not is_there(operation.path)}
    assert hidden == {"/metrics"}
    assert not is_there("/admin/models")
    assert is_there("/playground/0123/page.js")
    assert all(is_there(path) for path in paths)


def test_what_one_object_names_is_there() -> None:
    """Selectors, ports, volumes, secrets, and what is scaled."""
    labels = {name: pod(name)["metadata"]["labels"] for name in ("nano-gpt-api", "redis")}
    for (kind, name), item in base().items():
        spec = item.get("spec", {})
        if kind in ("Service", "Deployment", "PodDisruptionBudget"):
            selector = spec["selector"].get("matchLabels", spec["selector"])
            assert selector.items() <= labels[name].items()
        if kind == "Deployment":
            template = spec["template"]["spec"]
            volumes = {volume["name"] for volume in template["volumes"]}
            for container in template["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        if kind == "HorizontalPodAutoscaler":
            assert (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]) in base()
    claim = next(v for v in pod("nano-gpt-api")["spec"]["volumes"] if v["name"] == "checkpoints")
    assert ("PersistentVolumeClaim", claim["persistentVolumeClaim"]["claimName"]) in base()
    secrets = {item["metadata"]["name"]: item["stringData"] for item in load(KUBERNETES / "examples" / "secret.yaml")}
    assert f":{secrets['redis']['REDIS_PASSWORD']}@redis:6379/" in secrets["nano-gpt-api"]["REDIS_URL"]
    assert not any(kind == "Secret" for kind, _ in base())


def test_every_pod_keeps_the_restricted_profile() -> None:
    """As the namespace enforces it; and beyond it a root that is read-only, and limits for memory."""
    assert (
        base()["Namespace", "nano-gpt-api"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )
    specs = [item["spec"]["template"]["spec"] for (kind, _), item in base().items() if kind == "Deployment"]
    [init] = example("checkpoint-from-image.yaml", "Deployment")["spec"]["template"]["spec"]["initContainers"]
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
    for container in [init, *(container for spec in specs for container in spec["containers"])]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"]
        assert container["resources"]["limits"]["memory"]


def test_the_autoscalers_metric_is_one_of_ours_and_the_adapter_gives_it() -> None:
    [metric] = base()["HorizontalPodAutoscaler", "nano-gpt-api"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"| `{name}` | gauge |" in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    [rule] = load(KUBERNETES / "examples" / "prometheus-adapter-values.yaml")[0]["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")
    assert re.fullmatch(rule["name"]["matches"], name)
    monitor = example("podmonitor.yaml", "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= pod("nano-gpt-api")["metadata"]["labels"].items()
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "nano-gpt-api", "key": "API_KEY"}


@pytest.mark.services
def test_redis_starts_as_its_pod_starts_it(tmp_path: Path) -> None:
    """The command line of redis.yaml: it wants the password, and evicts nothing."""
    require_service("redis-server", shutil.which("redis-server") is not None, "make services installs it")
    [container] = pod("redis")["spec"]["containers"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    [script] = container["args"]
    assert "/tmp/redis.conf" in script
    script = script.replace("/tmp/redis.conf\n      ", "").replace("/tmp/redis.conf", str(tmp_path / "redis.conf"))
    script = script.rstrip("\n") + f" --port {port} --bind 127.0.0.1"
    process = subprocess.Popen(
        [*container["command"], script], env=os.environ | {"REDIS_PASSWORD": "secret"}, stdout=subprocess.DEVNULL
    )

    def ask(*words: str) -> str:
        command = ["redis-cli", "-p", str(port), "--no-auth-warning", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout

    try:
        wait_for(lambda: "NOAUTH" in ask("ping"), START_S, "it wants a password")
        assert ask("-a", "secret", "ping") == "PONG\n"
        assert "noeviction" in ask("-a", "secret", "config", "get", "maxmemory-policy")
        assert json.loads(ask("-a", "secret", "--json", "config", "get", "save")) == {"save": ""}
        assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
    finally:
        process.terminate()
        process.wait(30)
