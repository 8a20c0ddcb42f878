"""Checks of this machine: what computes, whether memory is enough, the port, the clock, open files."""

from __future__ import annotations

import errno
import json
import os
import socket
import urllib.request
from collections.abc import Iterable, Iterator

from nanogpt.doctor.findings import Finding, check, fail, gigabytes, ok, warn
from nanogpt.doctor.here import Here, Need
from nanogpt.errors import NanoGPTError

# Of the memory that is free, what a server may plan with: the rest is for bodies, answers and the page cache.
_ROOM = 0.9
# Files that a worker or gunicorn has open beside its connections: sockets of the engine, modules, pipes.
_OTHER_FILES = 64
# 2024-01-01: this product is younger.
_NOT_BEFORE = 1_704_067_200


@check("gpu-not-available")
def hardware(here: Here) -> Iterator[Finding]:
    """What computes, where, in which precision, and how fast."""
    cpus = f"{here.machine.cpus} CPU" + ("s" if here.machine.cpus > 1 else "")
    trial = here.trial
    if isinstance(trial, NanoGPTError):
        raise trial
    if trial is None:  # there is no model, or no room for it: other checks say so
        name, device = here.runner()
        yield ok(f"The {name} runner would compute on {device} ({cpus}).")
        return
    speed = f"{1 / trial.token_s:,.0f} tokens/s alone" if trial.token_s else "too fast to measure"
    said = f"{trial.runner} runner, {trial.precision} on {trial.device} ({cpus}): {speed}."
    if trial.device == "cpu" and trial.runner == "torch" and here.settings.runner == "auto":
        yield warn(
            f"PyTorch computes on the CPU: {said}",
            "Install a C++ compiler and then nano-gpt-api again: the compiled runner is faster on a CPU.",
        )
    else:
        yield ok(said)
    threads = here.settings.threads
    if trial.device == "cpu" and threads > here.machine.cpus:
        yield warn(
            f"NANOGPT_THREADS is {threads}, and this process may use {cpus}: threads wait for each other.",
            "Leave NANOGPT_THREADS at 0.",
        )


@check("gpu-not-available")
def gpu(here: Here) -> Iterator[Finding]:
    """Whether a GPU is seen, or why not."""
    found, asked = here.machine.gpu, here.settings.device
    if not found.problem:
        if here.runner()[1] == "cuda":
            yield ok(f"{found.name}, {gigabytes(found.free_bytes)} free.")
        else:
            yield warn(f"{found.name} is there, and the settings compute on the CPU.", "Set NANOGPT_DEVICE=cuda.")
    elif asked == "cuda":
        yield fail(found.problem, found.remedy or "Set NANOGPT_DEVICE=auto to compute on the CPU.")
    elif found.has_driver and asked == "auto":
        yield warn(f"A driver is there, but no GPU is used: {found.problem}", found.remedy or "Check nvidia-smi.")
    else:
        yield ok(f"{found.problem} The CPU computes.")


@check("out-of-memory")
def memory(here: Here) -> Iterator[Finding]:
    """Whether the models, their K and V and the processes fit; and one or two more while one of them is changed."""
    needs = []
    for subject, name in ((here, "checkpoint"), (here.second, "compare")):
        if subject is None:
            continue
        if subject.checkpoint is None:
            yield warn("Not looked at: there is a model that cannot be loaded.", f"Mend what `{name}` says first.")
            return
        needs.append(subject.need(subject.checkpoint))
    processes = here.other_bytes() + sum(need.engine for need in needs)
    on_gpu = needs[0].where == "cuda"
    free = here.machine.gpu.free_bytes if on_gpu else here.machine.free_bytes
    if on_gpu and processes > here.machine.free_bytes * _ROOM:
        yield fail(
            f"The processes need {gigabytes(processes)}, {gigabytes(here.machine.free_bytes)} are free.",
            "Lower NANOGPT_HTTP_WORKERS or NANOGPT_CACHE_BYTES, or give the container more memory.",
        )
    beside = 0 if on_gpu else processes
    models = sum(need.model for need in needs)
    parts = f"weights {_sizes(need.weights for need in needs)}, K and V {_sizes(need.kv for need in needs)}"
    parts += "" if on_gpu else f", processes {gigabytes(processes)}"
    what = "Serving" if len(needs) == 1 else "Serving two models"
    said = f"{what} needs up to {gigabytes(models + beside)} ({parts}); {gigabytes(free)} are free"
    if models + beside > free * _ROOM:
        less = "" if len(needs) == 1 else "Leave COMPARE_CHECKPOINT out. Else: "
        yield fail(f"{said}.", f"{less}Lower NANOGPT_MAX_BATCH_SIZE, take a smaller model, or give it more memory.")
        return
    yield ok(f"{said}.")
    yield from _while_it_changes(here, needs, beside, free)


def _while_it_changes(here: Here, needs: list[Need], beside: int, free: int) -> Iterator[Finding]:
    """The first model may have a former one that stands by; a new one comes, for either."""
    settings = here.settings
    if not settings.admin_key and not settings.follow:
        return
    held = needs if not settings.standby else [needs[0], *needs]
    may_change = needs if settings.admin_key else needs[:1]  # who follows a folder changes the first one alone
    peak = sum(need.model for need in held) + max(need.model for need in may_change) + beside
    if peak > free * _ROOM:
        yield warn(
            f"While a model is changed there are {len(held) + 1} in memory, which needs {gigabytes(peak)};"
            f" {gigabytes(free)} are free.",
            "NANOGPT_STANDBY=false holds one less; or lower NANOGPT_MAX_BATCH_SIZE."
            if settings.standby
            else "Lower NANOGPT_MAX_BATCH_SIZE, or change the model by a restart.",
        )


def _sizes(counts: Iterable[int]) -> str:
    return " + ".join(gigabytes(count) for count in counts)


@check("the-port-is-taken")
def port(here: Here) -> Iterator[Finding]:
    """Whether the server can listen where it should."""
    host, number = here.settings.host, here.settings.port
    where = f"{f'[{host}]' if ':' in host else host}:{number}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and (status := _our_server_at(host, number)):
            yield warn(
                f"A nano-gpt-api server listens at {where} already; it is {status}.",
                f"Check it with --url http://{where}, or choose another PORT for a second one.",
            )
            return
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror)
        yield fail(f"Cannot listen at {where}: {reason}.", "Choose another with HOST and PORT, or end who has it.")
        return
    yield ok(f"{where} is free." if number else f"Any free port of {host}.")


def _our_server_at(host: str, number: int) -> str:
    """What /health of a server of ours says there; empty for anybody else."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{f'[{host}]' if ':' in host else host}:{number}/health", timeout=2) as answer:
            body = json.loads(answer.read(65536))
    except (OSError, ValueError):
        return ""
    return str(body.get("status", "")) if isinstance(body, dict) and "model_loaded" in body else ""


@check("the-clock")
def clock(here: Here) -> Iterator[Finding]:
    """Logs, traces, certificates and limits over several hosts go by it."""
    if here.machine.now < _NOT_BEFORE:
        yield fail("The clock is years behind.", "Set it, and start chrony or systemd-timesyncd.")
    elif here.machine.clock_is_synchronized is False:
        yield warn("The kernel does not know the clock as synchronized.", "Start chrony or systemd-timesyncd.")
    else:
        yield ok("The clock is synchronized." if here.machine.clock_is_synchronized else "The clock is plausible.")


@check("too-many-open-files")
def file_descriptors(here: Here) -> Iterator[Finding]:
    """Each connection is an open file of its worker."""
    from nanogpt.web.gunicorn_hooks import configuration

    connections = int(configuration(here.settings)["worker_connections"])
    most, needed = here.machine.max_open_files, connections + _OTHER_FILES
    if most < here.settings.http_threads + _OTHER_FILES:
        yield fail(
            f"A process may open {most:,} files, and a worker holds up to {here.settings.http_threads:,} requests.",
            f"ulimit -n {needed}, LimitNOFILE={needed} for systemd; or lower NANOGPT_HTTP_THREADS.",
        )
    elif most < needed:
        yield warn(
            f"A process may open {most:,} files; a worker holds up to {connections:,} connections, idle ones included.",
            f"ulimit -n {needed}, or LimitNOFILE={needed} for systemd.",
        )
    else:
        yield ok(f"A process may open {most:,} files; a worker needs up to {needed:,}.")


CHECKS = (hardware, gpu, memory, port, clock, file_descriptors)
