"""Files that were cut short, flipped or made to lie: always our own error or a whole model, and nothing is executed.

Every file here is small, so that thousands are tried. How long and how much memory the worst of them may take is
``tests/unit/test_checkpoint_limits.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    CHARACTERS,
    archive,
    arrays,
    executing_nothing,
    llmc_file,
    nanogpt_file,
    safetensors_file,
    trained_here_file,
    without_checksums,
    write_huggingface,
    write_meta,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanogpt.checkpoint import Checkpoint, load_checkpoint
from nanogpt.checkpoint.pickle_machine import _ACTIONS
from nanogpt.checkpoint.safe_pickle import loads
from nanogpt.errors import NanoGPTError

EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Load = Callable[[bytes], Checkpoint | None]


@pytest.fixture(params=["nanogpt", "trained here, without checksums", "safetensors", "llm.c"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[bytes, Load]:
    """A small file of a family, and what loads its variants: a checkpoint, or None where it was refused."""
    setting = "" if "trained" in request.param else str(write_meta(tmp_path))
    folder = write_huggingface(tmp_path / "hf")
    data, path = {
        "nanogpt": (nanogpt_file(), tmp_path / "ckpt.pt"),
        "trained here, without checksums": (without_checksums(trained_here_file()), tmp_path / "model_00007.pt"),
        "safetensors": ((folder / "model.safetensors").read_bytes(), folder / "model.safetensors"),
        "llm.c": (llmc_file(), tmp_path / "model.bin"),
    }[request.param]

    def load(variant: bytes) -> Checkpoint | None:
        path.write_bytes(variant)
        result = attempt(lambda: load_checkpoint(path, tokenizer=setting))
        if isinstance(result, NanoGPTError):
            assert result.exit_code == 2
            assert str(result).isprintable()
            assert len(str(result)) < 2000
            return None
        whole(result)
        return result

    path.write_bytes(data)
    load_checkpoint(path, tokenizer=setting)  # imports what loading imports, before that is watched
    return data, load


def attempt(load: Callable[[], Any]) -> Any:
    """What it gives, or the error of ours that it ends in; any other is a failure of the test."""
    with executing_nothing():
        try:
            return load()
        except NanoGPTError as error:
            return error


def whole(checkpoint: Checkpoint) -> None:
    """What was not refused is a model that can be computed."""
    shapes = checkpoint.config.tensor_shapes()
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == shapes
    assert all(np.isfinite(tensor.float32()).all() for tensor in checkpoint.tensors.values())


def borders(data: bytes) -> Iterator[int]:
    """Where something begins or ends: zip headers and their data, the safetensors header, every tensor."""
    signatures = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"ckpt/", b'"transformer', b'"data_offsets')
    for signature in signatures:
        at = data.find(signature)
        while at >= 0:
            yield from (at, at + len(signature))
            at = data.find(signature, at + 1)
    yield from (0, 1, 4, 8, 1024, len(data) - 1, len(data) - 22)
    if data[8:9] == b"{":
        yield 8 + struct.unpack_from("<Q", data)[0]
    for value in arrays().values():
        for layout in (value, np.ascontiguousarray(value.T)):
            at = data.find(layout.tobytes())
            if at >= 0:
                yield from (at, at + layout.nbytes)


def test_a_file_cut_at_any_border_is_refused(family: tuple[bytes, Load]) -> None:
    data, load = family
    cuts = sorted({cut + by for cut in borders(data) for by in (-1, 0, 1) if 0 <= cut + by < len(data)})
    assert len(cuts) > 60
    for cut in cuts:
        assert load(data[:cut]) is None, cut


@EXAMPLES
@given(st.data())
def test_a_file_cut_anywhere_is_refused(family: tuple[bytes, Load], draw: st.DataObject) -> None:
    data, load = family
    assert load(data[: draw.draw(st.integers(0, len(data) - 1))]) is None


@EXAMPLES
@given(st.data())
def test_flipped_bytes_are_refused_or_make_another_model(family: tuple[bytes, Load], draw: st.DataObject) -> None:
    data, load = family
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        changed[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    load(bytes(changed))


@EXAMPLES
@given(st.data())
def test_bytes_put_in_taken_out_or_moved(family: tuple[bytes, Load], draw: st.DataObject) -> None:
    data, load = family
    a, b, c = sorted(draw.draw(st.tuples(*[st.integers(0, len(data))] * 3)))
    insert = draw.draw(st.binary(max_size=16))
    load(draw.draw(st.sampled_from([data[:a] + insert + data[b:], data[:a] + data[b:c] + data[a:b] + data[c:]])))


@EXAMPLES
@given(st.binary(max_size=300))
def test_any_bytes(family: tuple[bytes, Load], garbage: bytes) -> None:
    _, load = family
    load(garbage)


@EXAMPLES
@given(st.data())
def test_numbers_in_headers_that_lie(family: tuple[bytes, Load], draw: st.DataObject) -> None:
    """Any two or four bytes become a number that people get wrong: -1, 0, a border of 16, 32 or 64 bits."""
    data, load = family
    code = draw.draw(st.sampled_from(["<H", "<i", "<q"]))
    size = struct.calcsize(code)
    bits = size * 8
    number = draw.draw(st.sampled_from([0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1)), 7, 255, 65_535]))
    at = draw.draw(st.integers(0, len(data) - size))
    value = struct.pack("<q", number)[:size]
    load(data[:at] + value + data[at + size :])


# -- pickles --------------------------------------------------------------------------------------------------

OPCODES = bytes(code for code, action in enumerate(_ACTIONS) if action is not None) + b"."
GLOBALS = [b"torch._utils\n_rebuild_tensor_v2\n", b"torch\nFloatStorage\n", b"collections\nOrderedDict\n",
           b"x\nGPTConfig\n", b"numpy\ndtype\n", b"numpy.core.multiarray\nscalar\n", b"_codecs\nencode\n",
           b"builtins\nset\n", b"os\nsystem\n", b"torch\nSize\n", b"torch\ndevice\n"]  # fmt: skip
INSTRUCTIONS = st.one_of(
    st.sampled_from(OPCODES).map(lambda code: bytes([code])),
    st.sampled_from(GLOBALS).map(lambda name: b"c" + name),
    st.text(max_size=8).map(lambda text: b"X" + struct.pack("<I", len(text.encode())) + text.encode()),
    st.integers(-(2**31), 2**31 - 1).map(lambda number: b"J" + struct.pack("<i", number)),
    st.sampled_from([b")", b"]", b"}", b"(", b"q\x00", b"h\x00", b"\x85", b"\x86", b"R", b"b", b"Q"]),
    st.binary(max_size=4),
)
PROGRAMS = st.lists(INSTRUCTIONS, max_size=40).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")


@settings(max_examples=1000, deadline=None)
@given(PROGRAMS)
def test_any_program_of_a_pickle_ends_in_a_value_or_our_error(program: bytes) -> None:
    result = attempt(lambda: loads(program, source="x"))
    assert not isinstance(result, NanoGPTError) or str(result).isprintable()
    assert len(repr(result)) < 10**6  # a tree of bounded size: whoever gets it may walk over it


@EXAMPLES
@given(program=PROGRAMS)
def test_any_program_in_a_checkpoint(program: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(archive(program, {"0": bytes(64)}))
    with executing_nothing(), pytest.raises(NanoGPTError):
        load_checkpoint(path)


@EXAMPLES
@given(draw=st.data())
def test_headers_of_safetensors_that_lie(draw: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    if not folder.exists():
        write_huggingface(folder)
        load_checkpoint(folder)
    numbers = st.one_of(st.integers(-2, 300), st.sampled_from([2**31, 2**48, 2**63, 2**64]), st.floats(), st.none())
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I64", "F8", "", None, 1, []]),
            "shape": st.lists(numbers, max_size=3),
            "data_offsets": st.lists(numbers, max_size=3),
        }
    )
    name = draw.draw(st.sampled_from([*arrays(), "lm_head.weight", "\ud800", "x" * 500]))
    (folder / "model.safetensors").write_bytes(safetensors_file(arrays(), **{name: draw.draw(entry)}))
    with executing_nothing(), pytest.raises(NanoGPTError):
        load_checkpoint(folder)


def test_the_small_files_are_whole(family: tuple[bytes, Load]) -> None:
    """Else everything above would be refused for another reason."""
    data, load = family
    checkpoint = load(data)
    assert checkpoint is not None
    assert checkpoint.config.vocab_size == len(CHARACTERS)
