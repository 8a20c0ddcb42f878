"""Protects the map of docs/architecture.md: imports point one way, and what should be light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "nanogpt"

# The floors of the house, from the ground up. A module may import from its own part and from lower floors only.
FLOORS: list[set[str]] = [
    {"_version", "errors"},
    {"settings", "sampling_params", "chat_template", "grammars", "keys"},
    {"logs", "kernels"},
    {"model", "tokenizer"},
    {"checkpoint"},
    {"runner"},
    {"engine"},
    {"llm"},
    {"web"},
    {"train", "eval", "bench", "doctor", "deploy"},
    {"cli"},
    {"__main__"},
]
FLOOR = {part: level for level, parts in enumerate(FLOORS) for part in parts}

# What a part must not import although it lies lower or is somebody else's: part → (forbidden, why).
FORBIDDEN = {
    "web": ({"nanogpt.checkpoint", "nanogpt.runner", "nanogpt.model", "nanogpt.llm", "numpy", "torch"},
            "HTTP workers never touch the checkpoint: they know the model by the engine's hello message"),
    "engine": ({"flask", "gunicorn", "werkzeug"}, "the engine knows nothing of HTTP"),
    "runner": ({"nanogpt.tokenizer", "flask"}, "a runner knows nothing of requests or text"),
    "kernels": ({"nanogpt"}, "kernels know nothing of Python objects but arrays"),
    "checkpoint": ({"torch", "pickle"}, "no pickle ever runs, and reading a checkpoint needs no PyTorch"),
    "tokenizer": ({"torch", "pickle"}, "no pickle ever runs"),
}  # fmt: skip

# Imports that break a rule on purpose: (module, imported) → the reason.
DELIBERATE: dict[tuple[str, str], str] = {
    ("nanogpt.tokenizer.characters", "nanogpt.checkpoint.safe_pickle.load_plain"): (
        "meta.pkl is a pickle, and the one reader of pickles belongs to checkpoints; imported when one is read"
    ),
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> set[str]:
    """Everything a module imports, wherever in it, by absolute name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: write the absolute import"
            # `from nanogpt.web import pages` imports nanogpt.web.pages
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def part_of(module: str) -> str | None:
    """The part of the house that a module belongs to; None for the package's own __init__ and for others' code."""
    names = module.split(".")
    return names[1] if names[0] == "nanogpt" and len(names) > 1 else None


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_point_one_way(module: str, path: Path) -> None:
    part = part_of(module)
    if part is None:
        return  # the public names, resolved late
    assert part in FLOOR, f"{module}: give {part} its floor in FLOORS, and its line in docs/architecture.md"
    wrong = []
    for name in sorted(imports(module, path)):
        other = part_of(name)
        if (module, name) in DELIBERATE or other in (None, part):
            continue
        if FLOOR.get(other, -1) >= FLOOR[part]:
            wrong.append(f"{module} (floor {FLOOR[part]}) imports {name} (floor {FLOOR[other]})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_parts_do_not_know_what_is_not_theirs(part: str) -> None:
    forbidden, why = FORBIDDEN[part]
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        if part_of(module) == part
        for name in sorted(imports(module, path))
        if (module, name) not in DELIBERATE
        and any(name == prefix or name.startswith(prefix + ".") for prefix in forbidden)
        and part_of(name) != part
    ]
    assert not wrong, f"{why}:\n" + "\n".join(wrong)


def test_what_is_deliberate_is_still_there() -> None:
    """An exception whose import has gone would hide the next one of its name."""
    there = {(module, name) for module, path in modules() for name in imports(module, path)}
    assert not set(DELIBERATE) - there


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import nanogpt", ("torch", "numpy", "flask", "pydantic")),
        ("from nanogpt import SamplingParams, NanoGPTError", ("torch", "numpy", "flask", "pydantic")),
        ("import nanogpt.settings", ("torch", "numpy", "flask", "pydantic")),
        ("import nanogpt.cli", ("torch", "numpy", "flask", "pydantic", "nanogpt.settings")),
        ("import nanogpt.web", ("torch", "numpy", "nanogpt.checkpoint", "llguidance", "redis")),
        ("import web.serve", ("torch", "numpy", "nanogpt.checkpoint")),
        ("import nanogpt.checkpoint", ("torch", "transformers", "safetensors")),
    ],
)
def test_what_is_light_stays_light(statement: str, heavy: tuple[str, ...]) -> None:
    """Start-up time and memory of workers and commands: seconds and hundreds of MB hang on one stray import."""
    code = f"import sys; {statement}; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]", f"{statement} loads {result.stdout}"
