"""Protects whoever installs the package: the wheel is whole, and works far away from this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import ROOT, require_service

from nanogpt._version import __version__

# Where the checkout has compiled nothing yet, the wheel's build does.
pytestmark = pytest.mark.timeout(600)

BUILD = [sys.executable, "-m", "build", "--no-isolation"]


def run(command: list[str], cwd: Path, **variables: str) -> str:
    """Standard output of a command that has to succeed, with no way back to this checkout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NANOGPT_"))}
    result = subprocess.run(
        command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel.

    Both come from the checkout, so that what `make install` compiled (build/) is not compiled again.
    """
    for tool in ("build", "scikit_build_core", "nanobind"):
        require_service(tool, find_spec(tool) is not None, "make test installs it")
    folder = tmp_path_factory.mktemp("dist")
    run([*BUILD, "--sdist", "--wheel", "--outdir", str(folder), str(ROOT)], ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in an environment of its own; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    [wheel] = built.glob("*.whl")
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)],
        folder)  # fmt: skip
    # Behind the wheel's own files on the path, and without the .pth file that leads to this checkout.
    packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    own = next((folder / "lib").glob("python*")) / "site-packages"
    for entry in packages.iterdir():
        if not entry.name.lower().startswith(("nanogpt", "nano_gpt_api", "_nano_gpt_api", "__pycache__", "_editable")):
            target = own / entry.name
            if not target.exists() and entry.suffix != ".pth":
                target.symlink_to(entry)
    return folder


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def tracked(*paths: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_the_wheel_holds_everything_that_the_package_reads(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = names_in(wheel)
    wanted = {name for name in tracked("nanogpt") if name.endswith((".py", ".pyi")) or "/assets/" in name}
    wanted |= set(tracked("nanogpt/web/playground"))
    assert (wanted | {"nanogpt/py.typed"}) - names == set()
    licences = {name.rpartition("/")[2] for name in names if "/licenses/" in name}
    assert "LICENSE" in licences


def test_the_wheel_holds_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    tops = {name.partition("/")[0] for name in names_in(wheel)}
    assert tops == {"nanogpt", f"nano_gpt_api-{__version__}.dist-info"}, "the repository's web/ or tests/ got in"


def test_the_source_distribution_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    """Whoever has only the archive gets the same package; the C++ is compiled from what is compared here."""
    [archive] = built.glob("*.tar.gz")
    run(["tar", "-xzf", str(archive)], tmp_path)
    [source] = tmp_path.iterdir()
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert tracked("nanogpt", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE") - files == set()
    assert not [name for name in files if name.startswith((".venv", "build/", "log/")) or name.endswith(".so")]
    run([*BUILD, "--wheel", "-C", "wheel.cmake=false", "--outdir", str(tmp_path), str(source)], tmp_path)
    [wheel], [rebuilt] = built.glob("*.whl"), tmp_path.glob("*.whl")
    mine, again = ({n for n in names_in(w) if not n.endswith(".so")} for w in (wheel, rebuilt))
    assert mine == again


def test_the_command_runs_from_anywhere(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "nanogpt")
    assert run([command, "--version"], tmp_path) == f"nanogpt {__version__}\n"
    where = run([str(installed / "bin" / "python"), "-c", "import nanogpt; print(nanogpt.__file__)"], tmp_path)
    assert where.startswith(str(installed)), "this is the checkout, not the wheel"


def test_the_embedded_model_is_inspected_and_continues_a_text(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "nanogpt")
    card = json.loads(run([command, "inspect", "--json"], tmp_path))
    assert card["name"] == "default"
    answer = json.loads(
        run([command, "generate", "Once upon a time", "--max-tokens", "20", "--seed", "1", "--json"], tmp_path,
            OMP_NUM_THREADS="1")
    )  # fmt: skip
    assert answer["generated_text"].startswith("Once upon a time")
    assert answer["tokens_generated"] == 20
