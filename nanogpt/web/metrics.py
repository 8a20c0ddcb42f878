"""What the HTTP workers count: requests, errors, the response cache, limits. One object a process, for all its threads.

    metrics.cache("hit")          # each event is one call, anywhere

Under gunicorn the numbers of all workers are kept together (``metrics_files``); in a process of its own they are just
its own. What the engine counts lives in the engine: ``metrics_page`` puts both on ``/metrics``.

prometheus-client is imported, and the files are made, when a process counts its first event: never before a fork.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from typing import Any

from nanogpt.engine.launch import shared_dir
from nanogpt.engine.stats import REQUEST_S
from nanogpt.errors import NanoGPTError, ServiceUnavailable
from nanogpt.settings import Settings
from nanogpt.web.metrics_files import MetricsFiles

log = logging.getLogger(__name__)

CACHE_RESULTS = ("hit", "miss", "bypass")
LIMITS = ("requests", "tokens", "concurrency")
# Codes that alerts ask for: there from the start, so that the first one is an increase.
_CODES = ("engine_died", "internal_error", "invalid_api_key", "queue_full", "rate_limited", "timeout", "unhealthy")
_MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """The process's counters, by what happens. Safe to share between threads, and across a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._settings = Settings()
        self._pid = -1
        self._families: _Families | None = None

    def configure(self, settings: Settings) -> None:
        """Which server this process belongs to. Creates nothing."""
        self._settings = settings

    def start(self) -> _Families:
        """Be ready to count. Every other method does this by itself."""
        families = self._families
        if families is None or self._pid != os.getpid():
            with self._lock:
                families = self._families
                if families is None or self._pid != os.getpid():
                    families = self._families = _Families(_open_files(self._settings))
                    self._pid = os.getpid()
        return families

    def collect(self) -> Iterable[Any]:
        """All metrics of the server's workers, as prometheus-client's families.

        Raises: ServiceUnavailable when the folder that they share is locked or gone.
        """
        try:
            return self.start().collect()
        except OSError as error:
            raise ServiceUnavailable(f"The workers' numbers cannot be read: {error.strerror or error}.") from None

    # -- events ----------------------------------------------------------------------------------------------------

    def http_begins(self) -> None:
        self.start().in_flight.inc()

    def http_ends(self, method: str, route: str, status: int, seconds: float, code: str | None) -> None:
        """The last byte is written. ``code`` is that of the error it was refused or ended with, if there was one."""
        families = self.start()
        families.in_flight.dec()
        families.requests.labels(method, route, str(status)).inc()
        families.duration.labels(method, route).observe(seconds)
        if code is not None:
            families.errors.labels(code).inc()

    def cache(self, result: str) -> None:
        """The response cache had the answer (``hit``), had not (``miss``) or was not asked (``bypass``)."""
        self.start().cache.labels(result).inc()

    def refused(self, kind: str) -> None:
        """A client is over its limit of ``requests``, ``tokens`` or ``concurrency``."""
        self.start().limits.labels(kind).inc()

    def redis(self, is_up: bool) -> None:
        """What this worker last saw of Redis. Without Redis it is never called, and nothing is shown."""
        self.start().redis(is_up)


class _Families:
    """prometheus-client's objects of one process."""

    def __init__(self, files: MetricsFiles | None) -> None:
        import prometheus_client
        from prometheus_client import values

        self._client = prometheus_client
        self._files = files
        self._redis: tuple[Any, Any] | None = None
        self._lock = threading.Lock()
        self._registry = prometheus_client.CollectorRegistry() if files is None else None
        # Where values are kept is decided when prometheus-client is imported, which somebody else may have done before.
        if files is not None:
            os.environ[_MULTIPROCESS_DIR] = str(files.folder)
            values.ValueClass = values.MultiProcessValue()
        elif values.ValueClass._multiprocess:
            values.ValueClass = values.MutexValue
        counter, registry = prometheus_client.Counter, self._registry
        self.in_flight = prometheus_client.Gauge(
            "nanogpt_http_requests_in_flight",
            "HTTP requests that are being answered now.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.requests = counter(
            "nanogpt_http_requests_total",
            "HTTP requests, counted when their last byte is written.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.duration = prometheus_client.Histogram(
            "nanogpt_http_request_duration_seconds",
            "Time from an HTTP request's arrival to the last byte of its answer.",
            ["method", "route"],
            buckets=REQUEST_S,
            registry=registry,
        )
        self.errors = counter(
            "nanogpt_request_errors_total",
            "Requests that were refused or ended with an error, by its code (client_closed_request: the client left).",
            ["code"],
            registry=registry,
        )
        self.cache = counter(
            "nanogpt_response_cache_requests_total",
            "Requests by what the response cache did for them.",
            ["result"],
            registry=registry,
        )
        self.limits = counter(
            "nanogpt_limit_refusals_total",
            "Requests that were refused because their client was over a limit, by the limit.",
            ["limit"],
            registry=registry,
        )
        for family, known in ((self.errors, _CODES), (self.cache, CACHE_RESULTS), (self.limits, LIMITS)):
            for value in known:
                family.labels(value)

    def redis(self, is_up: bool) -> None:
        with self._lock:
            self._redis = self._redis or self._make_redis()
        self._redis[0].set(float(is_up))
        if not is_up:
            self._redis[1].inc()

    def _make_redis(self) -> tuple[Any, Any]:
        up = self._client.Gauge(
            "nanogpt_redis_up",
            "Whether Redis answers: 0 when any worker last saw it fail.",
            registry=self._registry,
            multiprocess_mode="livemin",
        )
        failures = self._client.Counter(
            "nanogpt_redis_failures_total", "Calls to Redis that failed.", registry=self._registry
        )
        return up, failures

    def collect(self) -> Iterable[Any]:
        if self._files is not None:
            return self._files.collect()
        assert self._registry is not None
        return self._registry.collect()


def _open_files(settings: Settings) -> MetricsFiles | None:
    """The folder that the server's workers share; None in a process that is a server of its own."""
    try:
        folder = shared_dir(settings)
        return MetricsFiles(folder / "metrics") if folder is not None else None
    except (NanoGPTError, OSError) as error:
        log.error("Each worker's metrics are its own: the folder that they share cannot be used: %s", error)
        return None


metrics = Metrics()
