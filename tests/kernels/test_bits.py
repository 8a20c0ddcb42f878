"""The kernels' stand-alone test against the golden file of bits: every instruction set of x86 (AMX's tiles in
software), NEON under qemu, and the former under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT, require_service

GOLDEN = ROOT / "tests" / "kernels" / "bits.txt"
COMPILER = "aarch64-linux-gnu-g++"

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]


def build_and_run(folder: Path, *options: str, runner: tuple[str, ...] = ()) -> str:
    require_service("cmake", shutil.which("cmake") is not None, "it builds the kernels' stand-alone test")
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-DNANOGPT_TESTS=ON", *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
        [*runner, str(folder / "bits_test"), str(GOLDEN)],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    assert "runtime error" not in result.stderr
    return result.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets of x86")
def test_every_instruction_set_gives_the_golden_bits_with_sanitizers_watching(tmp_path: Path) -> None:
    output = build_and_run(tmp_path, "-DNANOGPT_EMULATED_AMX=ON", "-DNANOGPT_SANITIZE=address,undefined")
    assert " portable\n" in output


def test_neon_gives_the_golden_bits(tmp_path: Path) -> None:
    native = platform.machine() == "aarch64"
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    require_service("qemu-aarch64", native or qemu is not None, "apt-get install qemu-user")
    require_service(COMPILER, native or shutil.which(COMPILER) is not None, "apt-get install g++-aarch64-linux-gnu")
    if native:
        output = build_and_run(tmp_path)
    else:
        output = build_and_run(
            tmp_path, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_EXE_LINKER_FLAGS=-static", runner=(str(qemu),)
        )  # fmt: skip
    assert " neon\n" in output
