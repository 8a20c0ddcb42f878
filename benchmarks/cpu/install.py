"""Installs the other engines, each into a virtual environment of its own, and converts the models for them.

Everything lies in a cache folder (``build/bench``) and is made once. A step that fails leaves its output in
``logs/`` there and raises ``EngineFailed`` with the last line: the table then says why the engine has no figures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cpu.engines import EngineFailed

CONVERT = Path(__file__).parent / "convert"

# Exact versions: a figure is only worth something with the version that gave it.
OPENVINO = ("openvino-genai==2026.4.1.0",)
CTRANSLATE2 = ("ctranslate2==4.8.5",)
LLAMA_CPP = "llama-cpp-python==0.3.36"
TORCH = ("torch==2.13.0", "transformers==5.23.0")
CONVERTERS = (*TORCH, "gguf==0.19.0", "ctranslate2==4.8.5")
OPTIMUM = ("torch==2.13.0", "optimum-intel[openvino]==2.2.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0")


class Installer:
    """``limit_s`` bounds each single step (a pip install, a build, a conversion)."""

    def __init__(self, cache: Path, limit_s: float) -> None:
        self.cache = cache
        self._limit_s = limit_s
        (cache / "logs").mkdir(parents=True, exist_ok=True)

    def venv(self, name: str, requirements: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
        """The Python of a virtual environment with these packages, and without the unwanted among what they pull in."""
        folder = self.cache / f"venv-{name}"
        python = folder / "bin" / "python"
        stamp = folder / "installed"
        wanted = "\n".join([sys.version, *requirements, *unwanted])
        if stamp.is_file() and stamp.read_text() == wanted:
            return python
        _say(f"installing {name}: {' '.join(requirements)}")
        shutil.rmtree(folder, ignore_errors=True)
        self._run(f"venv-{name}", [sys.executable, "-m", "venv", str(folder)])
        self._run(f"pip-{name}", [str(python), "-m", "pip", "install", *requirements])
        if unwanted:
            self._run(f"pip-{name}", [str(python), "-m", "pip", "uninstall", "-y", *unwanted])
        stamp.write_text(wanted)
        return python

    def converters(self) -> Path:
        return self.venv("converters", CONVERTERS)

    def llama_cpp(self) -> Path:
        """The folder of llama.cpp's programs, built for this very processor from the source package."""
        version = LLAMA_CPP.partition("==")[2]
        folder = self.cache / f"llama-cpp-{version}"
        programs = folder / "build" / "bin"
        stamp = folder / "built"
        if stamp.is_file():
            return programs
        _say(f"building {LLAMA_CPP} for this processor (about ten minutes on two cores)")
        python = self.venv("llama-build", ("cmake>=3.28", "ninja"))
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(python), "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        self._run("llama-download", [*pip, LLAMA_CPP])
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            # Nothing but files below the folder; the argument is missing from early 3.10 and 3.11 releases.
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]
        source = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
        tools = python.parent
        self._run(
            "llama-cmake",
            [
                str(tools / "cmake"), "-G", "Ninja", "-S", str(source), "-B", str(programs.parent),
                f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
                "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
                "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON",
            ],
        )  # fmt: skip
        targets = ["llama-bench", "llama-batched-bench", "llama-server"]
        self._run("llama-build", [str(tools / "ninja"), "-C", str(programs.parent), *targets])
        stamp.write_text(version)
        return programs

    def gguf(self, model: Path, type_name: str, head: str) -> Path:
        out = self.cache / "gguf" / f"{model.name}-{type_name}-{head}.gguf"
        command = [str(CONVERT / "gguf_model.py"), str(model)]
        return self._converted(model, out, lambda: [str(self.converters()), *command, str(out), type_name, head])

    def ctranslate2(self, model: Path) -> Path:
        out = self.cache / "ctranslate2" / model.name
        options = ["--model", str(model), "--output_dir", str(out), "--quantization", "int8", "--force"]
        return self._converted(
            model, out, lambda: [str(self.converters().with_name("ct2-transformers-converter")), *options]
        )

    def openvino(self, model: Path, weights: str) -> Path:
        """int8: as the exporter does it. int4: groups of 64 as ours, embedding and head in 4 bits as well."""
        out = self.cache / "openvino" / f"{model.name}-{weights}"
        options = ["-m", str(model), "--task", "text-generation-with-past", "--weight-format", weights]
        if weights == "int4":
            options += ["--sym", "--group-size", "64", "--ratio", "1.0", "--all-layers"]

        def command() -> list[str]:
            # torchvision comes for image models only, and a build for another PyTorch breaks the import.
            python = self.venv("openvino-export", OPTIMUM, unwanted=("torchvision",))
            return [str(python.with_name("optimum-cli")), "export", "openvino", *options, str(out)]

        return self._converted(model, out, command)

    def _converted(self, model: Path, out: Path, command: Callable[[], list[str]]) -> Path:
        """Run the converter unless its output is there, made from the same model."""
        stamp = out.with_name(out.name + ".made")
        wanted = (model / "made").read_text()
        if not (out.exists() and stamp.is_file() and stamp.read_text() == wanted):
            out.parent.mkdir(parents=True, exist_ok=True)
            _say(f"converting {model.name} to {out.parent.name}/{out.name}")
            self._run(f"convert-{out.parent.name}-{out.name}", command())
            stamp.write_text(wanted)
        return out

    def _run(self, name: str, command: list[str]) -> None:
        # pip's constraints pin what the product itself is tested with; the peers have requirements of their own.
        environment = {k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
        environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        environment["HF_HUB_OFFLINE"] = "1"
        log = self.cache / "logs" / f"{name}.log"
        with log.open("wb") as file:
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, timeout=self._limit_s
                )
            except subprocess.TimeoutExpired:
                raise EngineFailed(f"{name} was not done within {self._limit_s:.0f} s (see {log})") from None
            except OSError as error:
                raise EngineFailed(f"{name}: {error}") from None
        if done.returncode:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise EngineFailed(f"{name} failed: {lines[-1].strip() if lines else 'it said nothing'} (see {log})")


def _say(message: str) -> None:
    print(f"# {message}", file=sys.stderr, flush=True)
