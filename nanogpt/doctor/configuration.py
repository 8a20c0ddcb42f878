"""Checks of the settings: who may come in, how much, how long it may take, what is written down; and Redis."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from nanogpt.doctor.findings import Finding, check, fail, gigabytes, ok, warn
from nanogpt.doctor.here import Here, Trial
from nanogpt.doctor.service import is_loopback
from nanogpt.errors import SettingsError
from nanogpt.web import tracing
from nanogpt.web.app import check_settings, open_keys
from nanogpt.web.rate_limit import describe, parse_rate_limit

# What a person can think of is guessed; `nanogpt keys` and `openssl rand -hex 32` make longer ones.
_MIN_KEY_CHARS = 16
# How much longer an answer may take when the server is full than when it is alone: a guess, on the safe side.
_UNDER_LOAD = 4
_METRICS_BYTES = 2 * 2**20  # a worker's file
_REDIS_TIMEOUT_S = 2.0
_SLOW_REDIS_S = 0.05


@check("error-codes")
def settings(here: Here) -> Iterator[Finding]:
    """What the server would refuse to start with."""
    check_settings(here.settings)
    open_keys(here.settings)
    folder = Path(here.settings.run_dir or tempfile.gettempdir())
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        yield fail(f"The run directory {folder} cannot be written to.", "Set NANOGPT_RUN_DIR to a folder of its user.")
        return
    room, needed = shutil.disk_usage(there).free, _METRICS_BYTES * here.settings.http_workers
    if room < 2 * needed:
        yield warn(
            f"The run directory {folder} has {gigabytes(room)} left; the workers keep {gigabytes(needed)} there.",
            "Make room, or set NANOGPT_RUN_DIR.",
        )
    yield ok("The server would take these settings.")


@check("slow-answers-and-time-outs")
def timeouts(here: Here) -> Iterator[Finding]:
    """Whether the longest answer fits into the times that end it."""
    s, trial, loaded = here.settings, here.trial, here.checkpoint
    if not isinstance(trial, Trial) or loaded is None:
        yield warn("Not measured: the model was not computed.", "Mend what `checkpoint` and `memory` say first.")
        return
    tokens = s.max_new_tokens
    if s.context_overflow == "stop":
        tokens = min(tokens, loaded.config.block_size)
    longest = tokens * trial.token_s
    said = f"The longest answer ({tokens:,} tokens) takes {longest:,.1f} s when the server is alone"
    if longest > s.request_timeout_s:
        yield fail(
            f"{said}; request_timeout_s, which ends it, is {s.request_timeout_s:g}.",
            f"Lower NANOGPT_MAX_NEW_TOKENS, or set NANOGPT_REQUEST_TIMEOUT_S above {longest * _UNDER_LOAD:,.0f}.",
        )
    elif longest * _UNDER_LOAD > s.request_timeout_s:
        yield warn(
            f"{said}, and several times as long when it is full; request_timeout_s is {s.request_timeout_s:g}.",
            f"Set NANOGPT_REQUEST_TIMEOUT_S above {longest * _UNDER_LOAD:,.0f}, and the proxy's time-out with it.",
        )
    elif longest > s.drain_timeout_s:
        yield warn(
            f"{said}; on SIGTERM it is cut after drain_timeout_s, {s.drain_timeout_s:g} s.",
            f"Set NANOGPT_DRAIN_TIMEOUT_S above {longest:,.0f}, and what stops the server must wait longer than that.",
        )
    else:
        yield ok(f"{said}; request_timeout_s is {s.request_timeout_s:g}: give a proxy that, too (proxy_read_timeout).")


@check("keys-and-open-routes")
def keys(here: Here) -> Iterator[Finding]:
    """Who may use the server, and who may change its model."""
    s = here.settings
    if s.api_key or s.keys_file:
        ring = open_keys(s)
        names = ([] if not s.api_key else ["API_KEY"]) + ([] if ring is None else [f"{len(ring)} keys of the file"])
        yield ok(f"Closed: {' and '.join(names)} open it.")
    elif not is_loopback(s.host):
        yield fail(f"Everybody who reaches {s.host} may use the server.", "Set API_KEY or NANOGPT_KEYS_FILE.")
    else:
        yield warn(
            "No key is set: whoever a proxy lets through, and everybody on this machine, may use the server.",
            "Set API_KEY or NANOGPT_KEYS_FILE.",
        )
    for name, key in (("API_KEY", s.api_key), ("ADMIN_KEY", s.admin_key)):
        if key and len(key) < _MIN_KEY_CHARS:
            yield warn(
                f"{name} has {len(key)} characters: such a key can be guessed, and wrong keys are not limited.",
                f"{name}=$(openssl rand -hex 32)",
            )


@check("limits")
def limits(here: Here) -> Iterator[Finding]:
    """How much one client may ask for."""
    s = here.settings
    rules = parse_rate_limit(s.rate_limit)
    if rules:
        where = "over all hosts with this Redis" if s.redis_url else "on this host"
        yield ok(f"{describe(rules)} for each client, counted {where}.")
    elif is_loopback(s.host) and not s.trusted_proxies:
        yield ok("RATE_LIMIT is off, and the server listens on this machine only.")
    else:
        yield warn("RATE_LIMIT is off: one client may take all that the queue admits to others.", "Set RATE_LIMIT.")
    if s.trusted_proxies and not is_loopback(s.host):
        yield warn(
            f"{s.trusted_proxies} trusted proxies, and the server listens at {s.host}: whoever reaches it past them"
            " can claim any address.",
            "Set HOST=127.0.0.1 where the proxy is on this machine, else let a firewall admit the proxies only.",
        )


@check("logs")
def logs(here: Here) -> Iterator[Finding]:
    """Whether each request leaves its two lines."""
    level, form = here.settings.log_level, here.settings.log_format
    if level in ("warning", "error"):
        yield warn(f"NANOGPT_LOG_LEVEL is {level}: requests leave no line.", "Set NANOGPT_LOG_LEVEL=info.")
    elif level == "debug":
        yield warn("NANOGPT_LOG_LEVEL is debug: probes and scrapes fill the log.", "Set NANOGPT_LOG_LEVEL=info.")
    else:
        yield ok(f"Two lines a request on standard error, as {form}.")


@check("metrics-and-traces")
def metrics(here: Here) -> Iterator[Finding]:
    """What a collector needs. Whether one comes can be asked of a running server (--url)."""
    closed = bool(here.settings.api_key or here.settings.keys_file)
    key = "with a key, as a bearer token" if closed else "without a key"
    yield ok(f"GET /metrics answers Prometheus {key}; --url tells whether it comes.")
    if tracing.is_wanted(os.environ) and importlib.util.find_spec("opentelemetry") is None:
        yield warn(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, and OpenTelemetry is not installed: there are no traces.",
            "pip install 'nano-gpt-api[otel]'",
        )


@check("redis")
def redis(here: Here) -> Iterator[Finding]:
    """Whether Redis answers, in time, and keeps what it counts."""
    url = here.settings.redis_url
    if not url:
        yield ok("REDIS_URL is not set: limits are counted on this host, answers are kept by each worker.")
        return
    where = _without_secrets(url)
    try:
        import redis as client
    except ImportError:
        yield fail("REDIS_URL is set, but redis-py is not installed.", "pip install 'nano-gpt-api[redis]'")
        return
    try:
        link = client.Redis.from_url(url, socket_timeout=_REDIS_TIMEOUT_S, socket_connect_timeout=_REDIS_TIMEOUT_S)
    except (ValueError, TypeError):
        raise SettingsError("REDIS_URL is not a URL of Redis.", remedy="See docs/deployment.md.") from None
    try:
        link.ping()
        since = time.perf_counter()
        link.ping()
        took = time.perf_counter() - since
        about = link.info()
    except (client.RedisError, OSError) as error:
        kind = type(error).__name__  # its text may quote the URL
        yield fail(f"Redis at {where} does not answer ({kind}).", "Start it, and check address and password.")
        return
    finally:
        link.close()
    policy = str(about.get("maxmemory_policy", "unknown"))
    if took > _SLOW_REDIS_S:
        yield warn(
            f"Redis at {where} takes {took * 1000:,.0f} ms for an answer; past 100 ms it is left alone.",
            "Put it into the same network.",
        )
    if about.get("role") != "master":
        yield fail(f"Redis at {where} is a replica: it counts nothing.", "Set REDIS_URL to the master.")
    if policy not in ("noeviction", "unknown") and parse_rate_limit(here.settings.rate_limit):
        yield warn(
            f"Redis at {where} evicts by {policy}: limits are forgotten when it is full.",
            "CONFIG SET maxmemory-policy noeviction",
        )
    yield ok(f"Redis {about.get('redis_version', '')} at {where} answers in {took * 1000:.1f} ms ({policy}).")


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    try:
        return f"{parts.hostname or parts.path}:{parts.port or 6379}" if parts.hostname else parts.path
    except ValueError:
        return "REDIS_URL"


CHECKS = (settings, timeouts, keys, limits, logs, metrics, redis)
