"""The rows of the table: which engine, in which mode, with which weights, and how it is started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu import install
from benchmarks.cpu.engines import Engine, EngineFailed, LlamaCpp, Worker
from benchmarks.cpu.install import Installer
from benchmarks.cpu.models import Model


@dataclass(frozen=True)
class Context:
    """What an engine needs to be made. Times in seconds."""

    installer: Installer
    model: Model
    folder: Path
    threads: int
    sample_s: float
    limit_s: float

    def worker(self, python: Path, script: str, **options: Any) -> Worker:
        options["threads"] = self.threads
        log = self.installer.cache / "logs" / f"{script}.log"
        limits = {"sample_s": self.sample_s, "limit_s": self.limit_s}
        return Worker(self.model, python, script, options, log=log, **limits)


@dataclass(frozen=True)
class Row:
    """``bits`` is the class that figures are compared within: int8, int4 or fp32."""

    engine: str
    bits: str
    mode: str
    make: Callable[[Context], Engine]

    @property
    def name(self) -> str:
        return f"{self.engine} {self.mode}"


def _nanogpt(bits: str) -> Callable[[Context], Engine]:
    def make(at: Context) -> Engine:
        return at.worker(Path(sys.executable), "nanogpt_worker.py", folder=str(at.folder), precision=bits)

    return make


def _llama_cpp(type_name: str, head: str) -> Callable[[Context], Engine]:
    def make(at: Context) -> Engine:
        gguf = at.installer.gguf(at.folder, type_name, head)
        programs = at.installer.llama_cpp()
        return LlamaCpp(at.model, programs, gguf, at.threads, sample_s=at.sample_s, limit_s=at.limit_s)

    return make


def _openvino(bits: str, backend: str) -> Callable[[Context], Engine]:
    def make(at: Context) -> Engine:
        python = at.installer.venv("openvino", install.OPENVINO)
        folder = at.installer.openvino(at.folder, bits)
        # Each the fastest that was found. Above the weights' own groups, 64 in int4, OpenVINO falls back to floats.
        properties = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128 if bits == "int8" else 64}
        script = "openvino_genai_worker.py"
        return at.worker(python, script, folder=str(folder), backend=backend, properties=properties)

    return make


def _ctranslate2(at: Context) -> Engine:
    python = at.installer.venv("ctranslate2", install.CTRANSLATE2)
    folder = at.installer.ctranslate2(at.folder)
    return at.worker(python, "ctranslate2_worker.py", folder=str(folder), compute_type="int8")


def _transformers(at: Context) -> Engine:
    python = at.installer.converters()
    return at.worker(python, "transformers_worker.py", folder=str(at.folder), dtype="float32")


OURS = "nano-gpt-api"
ROWS = (
    Row(OURS, "int8", "int8", _nanogpt("int8")),
    Row(OURS, "int4", "int4", _nanogpt("int4")),
    Row("llama.cpp", "int8", "Q8_0", _llama_cpp("Q8_0", "tied")),
    Row("llama.cpp", "int8", "Q8_0, head untied", _llama_cpp("Q8_0", "untied")),
    Row("llama.cpp", "int4", "Q4_0, head untied", _llama_cpp("Q4_0", "untied")),
    Row("openvino", "int8", "int8, paged attention", _openvino("int8", "PA")),
    Row("openvino", "int8", "int8, stateful", _openvino("int8", "SDPA")),
    Row("openvino", "int4", "int4, paged attention", _openvino("int4", "PA")),
    Row("openvino", "int4", "int4, stateful", _openvino("int4", "SDPA")),
    Row("ctranslate2", "int8", "int8", _ctranslate2),
    Row("transformers", "fp32", "fp32, static cache", _transformers),
)
ENGINES = tuple(dict.fromkeys(row.engine for row in ROWS))


def start(row: Row, context: Context) -> Engine | str:
    """The running engine, or why there is none."""
    try:
        engine = row.make(context)
    except EngineFailed as failure:
        return str(failure)
    try:
        engine.start()
    except EngineFailed as failure:
        engine.close()
        return str(failure)
    return engine
