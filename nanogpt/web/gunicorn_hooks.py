"""gunicorn's configuration and hooks: how our server starts, drains and ends. Used by the root's ``gunicorn.conf.py``
and by ``nanogpt serve`` alike.

The arbiter checks the settings, starts the engine's supervisor before it listens, and forks light workers that all
talk to that one engine. Which signal does what:

- SIGTERM: workers stop accepting, ``/health`` says draining, running texts go on for ``drain_timeout_s``, exit 0.
- SIGHUP: new workers with the settings file read again; the old ones finish their texts; the engine goes on.
- SIGINT, SIGQUIT: running texts end at once with an error event.
- SIGKILL of the arbiter: workers see their parent change, the supervisor sees its owner gone; all end.
"""

from __future__ import annotations

import dataclasses
import gc
import ipaddress
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker

from nanogpt.engine.client import EngineClient, EngineStatus
from nanogpt.engine.history import Role
from nanogpt.engine.launch import Handle, start_supervisor
from nanogpt.errors import NanoGPTError
from nanogpt.settings import Settings
from nanogpt.web import process
from nanogpt.web.app import check_settings, create_app, open_keys
from nanogpt.web.exposure import exposure_lines
from nanogpt.web.greeting import greeting
from nanogpt.web.gunicorn_worker import SheddingWorker
from nanogpt.web.metrics import metrics

log = logging.getLogger(__name__)

# Threads beside those that hold generations: for /health, for refusals, for bodies that are still arriving.
SPARE_THREADS = 16
# Kept-alive connections that a worker may hold beside those that are being served.
_IDLE_CONNECTIONS = 1000
# How long the start waits for the model. One that takes longer loads while /health says so.
_WAIT_FOR_ENGINE_S = 10.0
# The drain's own deadline comes first, so that the last streams still get their error event before gunicorn kills.
_KILL_AFTER_DRAIN_S = 2
# What the last error events may take to be written, when a worker has nothing else to wait for.
_LAST_WORDS_S = 5.0
# Read again on SIGHUP; whatever else changed needs a new engine, and so a restart.
_RELOADABLE = frozenset(
    {"api_key", "admin_key", "rate_limit", "max_body_bytes", "max_prompt_chars", "max_new_tokens", "request_timeout_s"}
    | {"keys_file", "trusted_proxies", "redis_url"}
    | {"stream_ping_s", "engine_wait_s", "http_workers", "http_threads", "drain_timeout_s", "log_format", "log_level"}
    | {"response_cache", "cache_bytes", "cache_entry_bytes", "cache_ttl_s", "redis_url"}
)

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

# How often the arbiter was told to reload. Shared with the workers: one that is being replaced thereby knows that the
# server as a whole is not going down.
_num_reloads = mmap.mmap(-1, 1)

# In the arbiter: the engines' supervisor, and how they were when the server started, the default model's first.
_supervisor: Handle | None = None
_states = [EngineStatus()]


def load_settings(load: Callable[[], Settings] = Settings.load) -> Settings:
    """Load and check the settings, and keep them for the app. Ends the process if they are wrong.

    On a reload, settings that are wrong are refused and the former ones stay: a slip in a file stops no server.
    """
    former = process.settings
    try:
        settings = load()
        check_settings(settings)
        keys = open_keys(settings)
    except NanoGPTError as error:
        if former is None:
            _fail(str(error), error.exit_code)
        log.error("The former settings stay: %s", error)
        return former
    if former is not None:
        kept = {
            field.name: getattr(former, field.name)
            for field in dataclasses.fields(Settings)
            if field.name not in _RELOADABLE and getattr(former, field.name) != getattr(settings, field.name)
        }
        if kept:
            log.warning("Takes effect at the next start only: %s.", ", ".join(kept))
        settings = dataclasses.replace(settings, **kept)
    process.settings, process.keys = settings, keys
    return settings


def configuration(settings: Settings) -> dict[str, Any]:
    """gunicorn's settings, hooks included. Its command line goes above them."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    num_threads = settings.http_threads + SPARE_THREADS
    values: dict[str, Any] = {
        "bind": f"{host}:{settings.port}",
        "worker_class": "nanogpt.web.gunicorn_worker.SheddingWorker",
        "threads": num_threads,
        "worker_connections": num_threads + _IDLE_CONNECTIONS,
        # Longer than nginx keeps its own idle connections (60 s): it never sends a request into one that is closing.
        "keepalive": 75,
        "graceful_timeout": int(settings.drain_timeout_s) + _KILL_AFTER_DRAIN_S,
        "logger_class": "nanogpt.web.gunicorn_log.GunicornLogger",
        "loglevel": settings.log_level,
        # Headers of proxies are the app's matter (the setting trusted_proxies): gunicorn shall believe none.
        "forwarded_allow_ips": "",
        # A second way to command the server that nobody asked for, at one path for all servers of a user.
        "control_socket_disable": True,
        "on_starting": on_starting,
        "when_ready": when_ready,
        "on_reload": on_reload,
        "post_fork": post_fork,
        "post_worker_init": post_worker_init,
        "worker_int": worker_int,
        "worker_exit": worker_exit,
        "on_exit": on_exit,
    }
    if settings.http_workers > 1 or "WEB_CONCURRENCY" not in os.environ:
        values["workers"] = settings.http_workers
    return values


# -- in the arbiter -------------------------------------------------------------------------------------------


def on_starting(arbiter: Arbiter) -> None:
    """Start the engine, before anything listens: what can never work is said here, in one line, and ends the start."""
    global _supervisor
    settings = process.settings or load_settings()
    _check_addresses(arbiter)
    try:
        _supervisor = start_supervisor(settings, os.getpid())
        _wait_for_engines(settings)
    except NanoGPTError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    for status in _states:
        if status.state == "unhealthy":
            _supervisor.stop(timeout_s=5.0)
            _fail(status.reason, 2)


def when_ready(arbiter: Arbiter) -> None:
    # What is imported by now lives as long as its process. Left out of every collection, the last one included, it
    # makes each of them end in half the time, and workers share its memory with the arbiter for longer.
    gc.freeze()
    settings = process.settings or Settings()
    addresses = [listener.getsockname() for listener in arbiter.LISTENERS]
    lines = greeting(settings, _states, [_url(address) for address in addresses])
    for line in [*lines, *exposure_lines(create_app(settings))]:
        log.info("%s", line)
    beyond = [_url(address) for address in addresses if not _is_loopback(address)]
    if beyond and not settings.api_key and not settings.keys_file:
        log.warning("Everybody who reaches %s may use this server: API_KEY is not set.", ", ".join(beyond))


def on_reload(arbiter: Arbiter) -> None:
    _num_reloads[0] = (_num_reloads[0] + 1) % 256


def on_exit(arbiter: Arbiter) -> None:
    """The workers are gone, and with them everybody who needs the engine."""
    if _supervisor is not None:
        _supervisor.stop(timeout_s=5.0)


def _wait_for_engines(settings: Settings) -> None:
    """Note how each is once it has loaded its model or failed to; after some seconds the server starts regardless."""
    roles: list[Role] = ["main", "compare"] if settings.compare_checkpoint else ["main"]
    until = time.monotonic() + _WAIT_FOR_ENGINE_S
    _states.clear()
    for role in roles:
        client = EngineClient(settings, role=role)
        try:
            _states.append(client.wait_ready(max(0.0, until - time.monotonic())))
        finally:
            client.close()  # its thread must not be there when the arbiter forks


def _fail(message: str, exit_code: int) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _check_addresses(arbiter: Arbiter) -> None:
    """One clear line when a port is taken, before anything is started; gunicorn tries for five seconds and logs ten."""
    if arbiter.cfg.reuse_port or arbiter.master_pid or "LISTEN_FDS" in os.environ:
        return  # the sockets are there already, or several may share the port
    for address in arbiter.cfg.address:
        if not isinstance(address, tuple):
            continue
        try:
            host, port = address
            family, kind, number, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, number) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(resolved)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            _fail(f"Cannot listen at {_url(address)}: {reason}. Choose another with HOST and PORT.", 1)


def _is_loopback(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket: the file's permissions say who comes in
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return bool(address[0] == "localhost")


def _url(address: Any) -> str:
    if not isinstance(address, tuple):
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}"


# -- in a worker ----------------------------------------------------------------------------------------------


def post_fork(arbiter: Arbiter, worker: Worker) -> None:
    """Hear a signal to stop that comes while this worker is being born.

    It inherits the arbiter's handlers, which put a signal into a queue that nobody here reads: the arbiter, having told
    it once, would wait for the whole of ``graceful_timeout``. What has not begun yet has nothing to finish.
    """
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
    while not arbiter.SIG_QUEUE.empty():
        if arbiter.SIG_QUEUE.get_nowait() in _STOPS:
            sys.exit(0)


def post_worker_init(worker: Worker) -> None:
    """Connect to the engine before the first request, and tell the app when this worker is on its way out."""
    settings = process.settings or Settings()
    born = _num_reloads[0]

    def on_term(signum: int, frame: FrameType | None) -> None:
        if process.stop_at is None:  # systemd tells each process itself, and then the arbiter tells it again
            process.stop_at = time.monotonic() + settings.drain_timeout_s
        worker.handle_exit(signum, frame)

    signal.signal(signal.SIGTERM, on_term)
    signal.siginterrupt(signal.SIGTERM, False)
    parts = getattr(worker.wsgi, "extensions", {})  # none where the app is wrapped in somebody's middleware
    models = parts.get("nanogpt")
    worker.shedder = parts.get("nanogpt.shedder")
    if worker.shedder is not None and isinstance(worker, SheddingWorker):
        worker.lend_sockets()
    # A handler that raises while a thread is being started (Ctrl-C) leaves that thread's locks in disorder. The thread
    # inherits the mask, so from then on signals come to the main thread, which is where they are handled.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        if models is not None:
            models.states()
        metrics.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    process.is_draining = lambda: process.stop_at is not None and _num_reloads[0] == born


def worker_int(worker: Worker) -> None:
    """Ctrl-C or SIGQUIT. The arbiter says it again after a terminal has; one more SystemExit would interrupt Python's
    own end, which lets the threads write their last events."""
    process.stop_at = time.monotonic()
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda number, frame: None)  # Python complains of SIG_IGN where one is under way


def worker_exit(arbiter: Arbiter, worker: Worker) -> None:
    """Threads that still hold a text end it now: Python joins them before the process can end.

    One that writes to a client that does not read cannot: such clients have had their time, and are left.
    """
    if worker.pid == os.getpid():  # gunicorn also calls this in the arbiter, for a worker that has vanished
        process.stop_at = time.monotonic()
        threading.Thread(target=_end_at_the_latest, name="end-at-the-latest", daemon=True).start()


def _end_at_the_latest() -> None:
    time.sleep(_LAST_WORDS_S)
    os._exit(0)
