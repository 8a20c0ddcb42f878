"""Which runner computes, and what is said where none can."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from support import ROOT
from tiny_model import tiny_checkpoint

from nanogpt.errors import MissingDependency, SettingsError
from nanogpt.runner import create_runner

torch = pytest.importorskip("torch")


class Native:
    name, device = "native", "cpu"

    def __init__(self, checkpoint: Any, **options: Any) -> None:
        self.options = options


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanogpt.runner.native", SimpleNamespace(NativeRunner=Native))  # type: ignore[arg-type]


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanogpt.runner.native", None)  # importing it is an ImportError


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("nanogpt.runner.torch", "nanogpt.model.gpt", "nanogpt.runner.sampler_torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As on a machine with a device; what PyTorch's runner would be made with."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("nanogpt.runner._DRIVER_FILES", (__file__,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("nanogpt.runner.torch.TorchRunner", lambda checkpoint, **options: made.append(options))
    return made


def create(**options: Any) -> Any:
    return create_runner(tiny_checkpoint(), **{"num_slots": 3, "threads": 1, "device": "cpu", **options})  # type: ignore[arg-type]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "native"),
        ({"precision": "int8"}, "native"),
        ({"precision": "fp32"}, "native"),
        ({"precision": "bf16"}, "torch"),
        ({"runner": "torch"}, "torch"),
        ({"runner": "native"}, "native"),
        ({"runner": "native", "device": "auto"}, "native"),
    ],
)
def test_the_runner_for_a_cpu(options: dict[str, Any], name: str) -> None:
    runner = create(**options)
    assert (runner.name, runner.device) == (name, "cpu")
    if name == "native":
        precision = options.get("precision", "auto")
        assert runner.options == {"precision": precision, "num_slots": 3, "threads": 1, "int8_matrices": ()}
    else:
        assert (runner.num_slots, runner.precision) == (3, options.get("precision", "fp32"))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("options", "on_device"),
    [({}, True), ({"precision": "fp16"}, True), ({"runner": "torch"}, True), ({"device": "cuda"}, True),
     ({"precision": "int4"}, False), ({"runner": "native"}, False), ({"device": "cpu"}, False)],
)  # fmt: skip
def test_where_there_is_a_device(options: dict[str, Any], on_device: bool, cuda: list[dict[str, Any]]) -> None:
    runner = create(**{"device": "auto", **options})
    assert [made["device"] for made in cuda] == (["cuda"] if on_device else [])
    assert on_device or runner.name == "native"


@pytest.mark.usefixtures("no_native")
def test_without_the_compiled_runner() -> None:
    assert create().name == "torch"
    for options in ({"runner": "native"}, {"precision": "int8"}):
        with pytest.raises(MissingDependency, match=r"native runner is not part .* C\+\+ compiler"):
            create(**options)


@pytest.mark.usefixtures("no_torch", "native")
def test_without_pytorch() -> None:
    assert create().name == "native"
    assert create(device="auto").name == "native"
    for options in ({"runner": "torch"}, {"precision": "bf16"}):
        with pytest.raises(MissingDependency, match=r"PyTorch is not installed.*pip install"):
            create(**options)
    with pytest.raises(MissingDependency, match=r"device is cuda, but PyTorch is not installed.*cuda"):
        create(device="cuda")


@pytest.mark.usefixtures("no_torch", "no_native")
def test_with_neither() -> None:
    with pytest.raises(MissingDependency, match=r"neither the compiled CPU runner nor PyTorch.*pip install"):
        create()


def test_cuda_that_is_not_there_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SettingsError, match=r"built without CUDA.*Install a CUDA build"):
        create(device="cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SettingsError, match=r"finds no CUDA device \(CUDA_VISIBLE_DEVICES is ''\).*nvidia-smi"):
        create(device="cuda")
    with pytest.raises(SettingsError, match="native runner computes on the CPU, not on cuda"):
        create(device="cuda", runner="native")


def test_choosing_a_cpu_does_not_import_pytorch() -> None:
    """Its import takes seconds; ``device=auto`` looks for a driver first."""
    code = (
        "import sys, nanogpt.runner as r; r._DRIVER_FILES = (); from types import SimpleNamespace\n"
        "sys.modules['nanogpt.runner.native'] = SimpleNamespace(NativeRunner=lambda checkpoint, **options: 'native')\n"
        "assert r.create_runner(None) == 'native'; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
