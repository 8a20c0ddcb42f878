"""An int4 plan is followed by all that compute the model, belongs to its weights alone, and is refused when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("nanogpt._kernels")

from checkpoint_files import arrays, write_nanogpt
from native_support import SHAPES, bits

from nanogpt import LLM
from nanogpt.checkpoint import load_checkpoint, weights_sha256
from nanogpt.cli import main
from nanogpt.engine.process import load_model
from nanogpt.errors import CheckpointError
from nanogpt.eval.quantization import choose_int8
from nanogpt.model.config import GPTConfig
from nanogpt.runner import create_runner
from nanogpt.runner.int4_plan import matrix_sizes, plan_path, read_plan, write_plan
from nanogpt.runner.native import NativeRunner, matrix_names
from nanogpt.settings import Settings

WTE = "transformer.wte"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(shared_checkpoints: Path, tmp_path: Path) -> Path:
    for name in ("ckpt.pt", "meta.pkl"):
        shutil.copyfile(shared_checkpoints / "01b_nanogpt_char_tiny" / name, tmp_path / name)
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrices_are_those_that_the_kernels_pack(shape: str) -> None:
    """A plan's names are checked without the kernels."""
    config = GPTConfig(
        **{
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 16,
            "block_size": 24,
            "vocab_size": 40,
            "num_tokens": 37,
            **SHAPES[shape],
        }
    )
    assert set(matrix_sizes(config)) == set(matrix_names(config))


def test_a_planned_mixture_is_what_computes(checkpoint: Path) -> None:
    """Same bits as the mixture made by hand, another size than int4 alone; every other precision leaves it aside."""
    loaded = load_checkpoint(checkpoint)
    ids = np.arange(20, dtype=np.int32)
    write_plan(loaded, [WTE], {})
    planned = create_runner(loaded, precision="int4", num_slots=1, threads=1)
    by_hand = NativeRunner(loaded, precision="int4", num_slots=1, threads=1, int8_matrices=[WTE])
    pure = NativeRunner(loaded, precision="int4", num_slots=1, threads=1)
    int8 = create_runner(loaded, precision="int8", num_slots=1, threads=1)
    assert isinstance(planned, NativeRunner)
    assert isinstance(int8, NativeRunner)
    np.testing.assert_array_equal(bits(planned.logits(ids)), bits(by_hand.logits(ids)))
    assert (bits(planned.logits(ids)) != bits(pure.logits(ids))).any()
    assert pure.packed_bytes < planned.packed_bytes < int8.packed_bytes
    assert (planned.int8_matrices, planned.arithmetic) == ([WTE], "int4 with 1 of 9 matrices in int8")
    assert (pure.int8_matrices, pure.arithmetic, int8.int8_matrices) == ([], "int4", None)
    for runner in (planned, by_hand, pure, int8):
        runner.close()


def test_the_engine_and_llm_follow_it_and_say_so(checkpoint: Path) -> None:
    """HTTP workers get it in the card, where it counts for what cached answers depend on."""
    write_plan(load_checkpoint(checkpoint), [WTE], {})
    model = load_model(Settings(model_checkpoint=str(checkpoint), precision="int4", max_batch_size=1, threads=1))
    assert model.card["int8_matrices"] == [WTE]
    assert model.card["arithmetic"] == "int4 with 1 of 9 matrices in int8"
    model.runner.close()
    with LLM(checkpoint, precision="int4", threads=1, max_batch_size=1) as llm:
        assert llm.card["int8_matrices"] == [WTE]


def test_without_a_plan_the_log_says_how_to_get_one(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "nanogpt.runner")
    create_runner(load_checkpoint(checkpoint), precision="int4", num_slots=1, threads=1).close()
    assert len([record for record in caplog.records if "nanogpt quantize" in record.getMessage()]) == 1
    caplog.clear()
    write_plan(load_checkpoint(checkpoint), [], {})
    create_runner(load_checkpoint(checkpoint), precision="int4", num_slots=1, threads=1).close()
    assert "nanogpt quantize" not in caplog.text


def broken(**changes: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda plan: json.dumps({**plan, **changes}).encode()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda plan: b"", "not JSON"),
        (lambda plan: json.dumps(plan).encode()[:-9], "not JSON"),
        (lambda plan: b"\xff\xfe", "not JSON"),
        (lambda plan: b"[" * 100_000, "not JSON"),
        (lambda plan: b" " * (1 << 21), "larger than"),
        (lambda plan: b"[]", "no JSON object"),
        (broken(format=2), "format is 2"),
        (broken(weights_sha256="../../etc"), "weights_sha256"),
        (broken(int8=None), "int8 is None"),
        (broken(int8=[1]), "int8"),
        (broken(int8=["transformer.h.99.mlp.c_fc"]), "transformer.h.99.mlp.c_fc"),
        (broken(weights_sha256="0" * 64), "000000000000"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(
    damage: Callable[[dict[str, Any]], bytes], said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one error that names the file, the reason and the remedy; int8 is served all the same."""
    loaded = load_checkpoint(checkpoint)
    path = write_plan(loaded, [WTE], {"text": "x"})
    path.write_bytes(damage(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match="nanogpt quantize") as caught:
        create_runner(loaded, precision="int4", num_slots=1, threads=1)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert main(["generate", str(checkpoint), "x", "--precision", "int4"]) == 2
    assert str(path) in capsys.readouterr().err
    create_runner(loaded, precision="int8", num_slots=1, threads=1).close()


def test_a_plan_of_other_weights_is_refused_where_the_file_was_replaced(tmp_path: Path) -> None:
    """Training goes on and writes the same ckpt.pt: the limit on the loss was measured on another model."""
    file = write_nanogpt(tmp_path / "in")
    write_plan(load_checkpoint(file), [WTE], {})
    assert read_plan(load_checkpoint(file)) == {WTE}
    write_nanogpt(tmp_path / "in", values=arrays(seed=1))
    with pytest.raises(CheckpointError, match="is for the weights"):
        read_plan(load_checkpoint(file))


def test_a_folder_keeps_it_inside_and_a_failed_write_leaves_nothing(shared_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shared_checkpoints / "06_hf_gpt2" / "safetensors", folder, copy_function=shutil.copyfile)
    folder.chmod(0o700)
    loaded = load_checkpoint(folder)
    assert write_plan(loaded, [WTE], {}) == folder / "int4.json"
    assert read_plan(load_checkpoint(folder)) == {WTE}
    plan_path(loaded).unlink()
    plan_path(loaded).mkdir()
    with pytest.raises(CheckpointError, match="--no-plan"):
        write_plan(loaded, [WTE], {})
    assert not [file.name for file in folder.iterdir() if ".new" in file.name]


@pytest.mark.parametrize("target", ["huggingface", "nanogpt"])
def test_a_conversion_takes_it_along(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_nanogpt(tmp_path / "in")
    write_plan(load_checkpoint(file), [WTE], {})
    for force in ([], ["--force"]):  # the second one replaces a folder that holds a plan
        assert main(["convert", str(file), str(tmp_path / "out"), "--to", target, *force]) == 0
    assert "int4 plan goes with it" in capsys.readouterr().out
    converted = load_checkpoint(tmp_path / "out")
    assert weights_sha256(converted) == weights_sha256(load_checkpoint(file))
    assert read_plan(converted) == {WTE}


def test_a_conversion_leaves_behind_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_nanogpt(tmp_path / "in")
    write_plan(load_checkpoint(file), [WTE], {}).write_text("{")
    assert main(["convert", str(file), str(tmp_path / "out")]) == 0
    assert "left behind" in capsys.readouterr().out
    assert read_plan(load_checkpoint(tmp_path / "out")) is None


@given(
    costs=st.lists(st.tuples(st.floats(-0.2, 1.0), st.integers(0, 1000)), min_size=1, max_size=60),
    limit=st.floats(-0.5, 5.0),
)
def test_the_choice_meets_the_limit_in_few_measurements(costs: list[tuple[float, int]], limit: float) -> None:
    """None only where int8 everywhere does not meet it; matrices at which int4 saves nothing are always in int8."""
    names = [str(i) for i in range(len(costs))]
    cost = {name: each[0] for name, each in zip(names, costs, strict=True)}
    saved = {name: each[1] for name, each in zip(names, costs, strict=True)}
    measured: list[frozenset[str]] = []

    def meets(int8: frozenset[str]) -> bool:
        measured.append(int8)
        return sum(cost[name] for name in names if name not in int8) <= limit

    chosen = choose_int8(names, cost, saved, meets)
    assert len(measured) <= 3 + 2 * ceil(log2(len(names) + 1))
    if chosen is None:
        assert limit < 0
    else:
        assert meets(chosen)
        assert {name for name in names if saved[name] == 0} <= chosen


def test_the_dearest_matrix_for_its_size_moves_first() -> None:
    sensitivity = {"large": 0.5, "small": 0.4, "harmless": -0.1}
    saved = {"large": 1000, "small": 10, "harmless": 500}

    def meets(int8: frozenset[str]) -> bool:
        return sum(sensitivity[name] for name in sensitivity if name not in int8) <= 0.45

    assert choose_int8(list(sensitivity), sensitivity, saved, meets) == {"small"}


def test_a_large_matrix_gives_back_those_that_moved_before_it() -> None:
    """An embedding is nearly all of a small model: once it is in int8, nothing else has to be."""
    sensitivity = {"a": 0.01, "embedding": 0.5, "b": 0.02, "c": 0.001}
    saved = {"a": 1, "embedding": 10_000, "b": 1, "c": 1}

    def meets(int8: frozenset[str]) -> bool:
        return sum(sensitivity[name] for name in sensitivity if name not in int8) <= 0.1

    assert choose_int8(list(sensitivity), sensitivity, saved, meets) == {"embedding"}
