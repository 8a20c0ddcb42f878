"""Checks of a running service: is it well, who may come in, does it count, can it go back, is it watched."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from nanogpt.doctor.findings import Finding, check, fail, ok, times, warn
from nanogpt.doctor.service import Answer, Service

# HEAD, so that what is read here is not taken for Prometheus by `metrics`.
_CLOSED_ROUTES = (("HEAD", "/v1/models"), ("HEAD", "/model_info"), ("HEAD", "/metrics"), ("POST", "/generate"))
# Fewer may have been people, and this command, which reads the page once.
_MIN_SCRAPES = 10
# Sequences in one step that only come of many requests at once.
_MANY_SEQUENCES = 8
_SKEW_WARN_S, _SKEW_FAIL_S = 5.0, 60.0
_RULE = re.compile(r"(\d+);w=(\d+)", re.ASCII)
_LABEL = re.compile(r'\w+="[^"]*"')
_SCRAPE = {'method="GET"', 'route="/metrics"', 'status="200"'}
# A closed server refuses paths that do not exist as well, but for want of the API key.
_WANTS_ADMIN_KEY = "Invalid admin key"
_REQUEST_ID = "nanogpt-doctor-looks"


def is_ours(answer: Answer) -> bool:
    """Whether /health was answered by this product."""
    return "model_loaded" in answer.fields and "status" in answer.fields


@check("the-service-does-not-answer")
def health(service: Service) -> Iterator[Finding]:
    """It answers, it is this server, and it takes requests."""
    answer = service.get("/health", key="none")
    if not is_ours(answer):
        location = answer.headers.get("Location")
        moved = f" and points to {location}" if location else ""
        yield fail(
            f"{service.url}/health answers {answer.status}{moved}, and not as this server does.",
            "Give the address at which the API lies; a proxy must pass /health on.",
        )
    elif answer.status != 200:
        reason = answer.fields.get("reason") or answer.fields["status"]
        yield fail(
            f"It is {answer.fields['status']}: {reason}", "The server's log says more; loading passes by itself."
        )
    elif service.get("/ready", key="none").status != 200:
        yield fail(
            "It is healthy, and /ready says that it takes no requests.", "Ask again; the server's log says more."
        )
    else:
        version = service.openapi.get("info", {}).get("version", "of an unknown version")
        yield ok(f"nano-gpt-api {version} is healthy, in {answer.seconds * 1000:,.0f} ms.")
    restarts = int(service.metrics.get("nanogpt_engine_restarts_total", 0))
    if restarts:
        yield warn(
            f"The engine was started again {times(restarts)} since the server's start.",
            "The server's log says what ended it; dmesg, whether memory was short.",
        )


@check("keys-and-open-routes")
def keys(service: Service) -> Iterator[Finding]:
    """Without a key, and with a wrong one, nothing but the open routes answers; with the right one all does."""
    opened = [
        path
        for method, path in _CLOSED_ROUTES
        if service.ask(method, path, key="none", body={} if method == "POST" else None).status not in (401, 403, 404)
    ]
    if opened:
        says = f"Open to everybody who reaches it: {', '.join(opened)}."
        remedy = "Set API_KEY or NANOGPT_KEYS_FILE."
        yield warn(says, remedy) if service.is_local else fail(says, remedy)
    elif service.get("/v1/models", key="wrong").status not in (401, 403):
        yield fail("A wrong key is let in.", "Look at what a proxy does with the header X-API-Key.")
    else:
        yield ok("Closed without a key, and with a wrong one.")
    if not service.has_api_key and not opened:
        yield warn("API_KEY is not set here: what needs a key is not looked at.", "Set API_KEY, or --api-key-file.")
    elif service.has_api_key and not opened and service.get("/v1/models").status in (401, 403):
        yield fail("The key in API_KEY is refused.", "Is it the server's, without a line break at its end?")


@check("keys-and-open-routes")
def admin(service: Service) -> Iterator[Finding]:
    """The routes that change the model want the admin key, and are for nobody outside."""
    answer = service.get("/admin/models", key="none")
    if answer.status == 200:
        yield fail("/admin answers without a key.", "Remove what adds the key on the way.")
    elif service.has_api_key and service.get("/admin/models", key="api").status == 200:
        yield fail("The API key opens /admin.", "Set another ADMIN_KEY.")
    elif answer.fields.get("error") != _WANTS_ADMIN_KEY:
        yield ok("/admin does not exist here, or is closed on the way.")
    elif service.is_local:
        yield ok("/admin wants the admin key.")
    else:
        yield warn(
            "/admin wants its key, and can be reached from outside.",
            "Close it in the proxy: location /admin/ { deny all; }",
        )


@check("no-way-back")
def rollback(service: Service) -> Iterator[Finding]:
    """Whether there is a model before, and whether it stands by."""
    if not service.has_admin_key:
        yield warn("ADMIN_KEY is not set here: whether there is a way back is not known.", "Set it for this command.")
        return
    answer = service.get("/admin/models", key="admin")
    models = answer.fields.get("models")
    if answer.status != 200 or not isinstance(models, list):
        words = str(answer.fields.get("error") or answer.status)
        yield warn(
            f"/admin/models is not told: {words}.",
            "Start the server with ADMIN_KEY; where a proxy closes /admin, ask the server: --url http://localhost:5000",
        )
        return
    known = [model for model in models if isinstance(model, dict)]
    standby = [model for model in known if model.get("state") == "standby"]
    retired = [model for model in known if model.get("state") == "retired"]
    if standby:
        yield ok(f"{standby[0].get('name')} stands by: nanogpt rollback is a switch.")
    elif retired:
        yield ok(f"nanogpt rollback loads {retired[0].get('name')} again.")
    else:
        yield warn(
            "Since its start the server has had one model: there is nothing to go back to.",
            "Start with the former checkpoint and `nanogpt reload` the new one; keep the former one's file.",
        )


@check("limits")
def limits(service: Service) -> Iterator[Finding]:
    """Whether the generating routes count their clients."""
    answer = service.post("/generate", {})
    if answer.status in (401, 403):
        yield warn("Not looked at: the key is refused.", "Set API_KEY to a key of the server.")
    elif answer.number("RateLimit-Limit") is not None:
        rules = _RULE.findall(str(answer.headers.get("RateLimit-Policy", "")))
        yield ok(f"A client may send {' and '.join(f'{count} requests in {s} s' for count, s in rules)}.")
    elif service.is_local:
        yield ok("RATE_LIMIT is off; this address is this machine's own.")
    else:
        yield warn("RATE_LIMIT is off: one client may take all that there is.", "Set RATE_LIMIT.")


@check("the-checkpoint")
def model(service: Service) -> Iterator[Finding]:
    """Which model is served."""
    info = service.model_info
    if not info:
        yield warn("/model_info is not told.", "Set API_KEY to a key of the server.")
        return
    said = f"{info.get('name')}: {info.get('family')}, {info.get('parameters')} parameters, context"
    said += f" {info.get('context')}, tokenizer {info.get('tokenizer')}, digest {str(info.get('digest'))[:12]}"
    if info.get("digest") == _embedded_digest():
        yield warn(f"{said}: the model that lies in the package, for trying out.", "Set MODEL_CHECKPOINT.")
    else:
        yield ok(f"{said}.")


def _embedded_digest() -> str:
    from nanogpt.checkpoint import load_checkpoint, weights_sha256

    return weights_sha256(load_checkpoint())


@check("gpu-not-available")
def hardware(service: Service) -> Iterator[Finding]:
    """Where the model is computed, and by what."""
    info = service.model_info
    if not info:
        yield warn("/model_info is not told.", "Set API_KEY to a key of the server.")
        return
    said = f"{info.get('runner')} runner, {info.get('precision')} on {info.get('device')}"
    if info.get("device") == "cpu" and info.get("runner") == "torch":
        yield warn(
            f"{said}: on a CPU the compiled runner is faster, and a GPU where there is one.",
            "`nanogpt doctor` on that machine says why neither is used.",
        )
    else:
        yield ok(f"{said}.")


@check("metrics-and-traces")
def metrics(service: Service) -> Iterator[Finding]:
    """Whether anybody scrapes /metrics."""
    found = service.metrics
    if not any(name.startswith("nanogpt_build_info") for name in found):
        yield warn(
            "/metrics is not told.", "Set API_KEY to a key of the server; let the proxy pass /metrics on to you."
        )
        return
    scrapes = sum(
        value
        for name, value in found.items()
        if name.startswith("nanogpt_http_requests_total{") and set(_LABEL.findall(name)) >= _SCRAPE
    )
    if scrapes < _MIN_SCRAPES:
        yield warn(
            f"/metrics {'was read ' + times(int(scrapes)) if scrapes else 'has not been read yet'}: nobody scrapes it.",
            "Prometheus with deploy/prometheus/prometheus.yml does; the alerts lie beside it.",
        )
    else:
        yield ok(f"/metrics was scraped {times(int(scrapes))}.")


@check("redis")
def redis(service: Service) -> Iterator[Finding]:
    """What the workers last saw of Redis."""
    up = service.metrics.get("nanogpt_redis_up")
    if not service.metrics:
        yield warn("/metrics is not told.", "Set API_KEY to a key of the server.")
    elif up is None:
        yield ok("No Redis was asked: this host counts and keeps answers by itself.")
    elif up:
        yield ok("Redis answers.")
    else:
        yield fail(
            "Redis does not answer the server.", "Start it, and check REDIS_URL; the server's log says the reason."
        )


@check("logs")
def logs(service: Service) -> Iterator[Finding]:
    """Whether a request can be found in the log by the id that its client gave it."""
    answer = service.get("/health", "none", **{"X-Request-Id": _REQUEST_ID})
    told = answer.headers.get("X-Request-Id")
    if told == _REQUEST_ID:
        yield ok("A client's X-Request-Id is kept: it is the id in the log.")
    elif told:
        yield warn("The X-Request-Id of a client is replaced on the way.", "Let the proxy pass X-Request-Id on.")
    else:
        yield warn("Answers have no X-Request-Id: it is taken out on the way.", "Let the proxy pass X-Request-Id on.")


@check("the-clock")
def clock(service: Service) -> Iterator[Finding]:
    """The header Date, written by the server or what is in front of it, against this machine's clock."""
    answer = service.get("/health", key="none")
    try:
        there = parsedate_to_datetime(str(answer.headers["Date"])).timestamp()
    except (TypeError, ValueError):
        yield warn("Answers have no Date.", "Let the proxy pass it on.")
        return
    # Date is cut to whole seconds, and was written at some moment between the request and now.
    skew = there + 0.5 - (answer.asked_at + answer.seconds / 2)
    said = f"The service's clock and this machine's differ by {abs(skew):,.0f} s"
    if abs(skew) > _SKEW_FAIL_S:
        yield fail(f"{said}.", "Synchronize both: chrony or systemd-timesyncd.")
    elif abs(skew) > _SKEW_WARN_S:
        yield warn(f"{said}.", "Synchronize both: chrony or systemd-timesyncd.")
    else:
        yield ok(f"The service's clock is right ({time.strftime('%H:%M:%S', time.gmtime(there))} UTC).")


@check("a-load-test")
def load_test(service: Service) -> Iterator[Finding]:
    """Whether the server has had many texts at once, as its histogram of batch sizes tells."""
    if not service.metrics:
        yield warn("/metrics is not told.", "Set API_KEY to a key of the server.")
        return
    most = largest_batch(service.metrics)
    if most < _MANY_SEQUENCES:
        yield warn(
            f"The engine has never computed {_MANY_SEQUENCES} texts at once: there was no load yet.",
            f"nanogpt bench serve {service.url}",
        )
    else:
        yield ok(f"The engine has computed {most} or more texts at once.")


def largest_batch(metrics: dict[str, float]) -> int:
    """Above how many sequences the largest step was, from the histogram's buckets; 0 for none."""
    buckets: dict[float, float] = {}  # of all models together
    for name, value in metrics.items():
        if name.startswith("nanogpt_step_sequences_bucket{") and (match := re.search(r'le="([^"]+)"', name)):
            buckets[float(match[1])] = buckets.get(float(match[1]), 0.0) + value
    bounds = [0.0, *sorted(buckets)]
    counts = [0.0, *(buckets[bound] for bound in sorted(buckets))]
    rises = [i for i in range(1, len(counts)) if counts[i] > counts[i - 1]]
    return int(bounds[rises[-1] - 1]) + 1 if rises else 0


CHECKS = (health, model, hardware, keys, admin, limits, rollback, redis, metrics, logs, clock, load_test)
