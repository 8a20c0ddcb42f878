"""Files of torch.save that lie: about where their members are, how large tensors are, and what lies where."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import (
    SIZES,
    Raw,
    archive,
    arrays,
    call,
    directory_entries,
    executing_nothing,
    name,
    nanogpt_file,
    op,
    patched,
    pickled,
    state_dict,
    storage,
    tensor,
    without_checksums,
    write_meta,
    write_nanogpt,
)

from nanogpt.checkpoint import Checkpoint, load_checkpoint
from nanogpt.errors import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint


def load(folder: Path, data: bytes) -> Checkpoint:
    write_meta(folder)
    (folder / "ckpt.pt").write_bytes(data)
    load_checkpoint(write_nanogpt(folder / "warm"))  # imports what loading imports
    with executing_nothing():
        return load_checkpoint(folder / "ckpt.pt")


def refused(folder: Path, data: bytes, error: type[CheckpointError] = CorruptCheckpoint) -> str:
    with pytest.raises(error) as caught:
        load(folder, data)
    message = str(caught.value)
    assert "ckpt.pt" in message
    assert len(message) < 600
    return message


def with_tensor(replacement: Raw, storages: dict[str, bytes] | None = None, **more: object) -> bytes:
    """A checkpoint whose wpe is something else."""
    model, stored = state_dict(arrays())
    model["transformer.wpe.weight"] = replacement
    value = {"model": model, "model_args": {**SIZES, "bias": True}, **more}
    return archive(pickled(value), stored | (storages or {}))


# -- what is read ---------------------------------------------------------------------------------------------


def test_a_small_checkpoint_is_read(tmp_path: Path) -> None:
    checkpoint = load(tmp_path, nanogpt_file())
    for key, value in arrays().items():
        np.testing.assert_array_equal(checkpoint.tensors[key].float32(), value)
    assert (checkpoint.step, checkpoint.recorded_loss) == (7, 1.25)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_stripped_in_any_order(prefix: str, tmp_path: Path) -> None:
    assert load(tmp_path, nanogpt_file(prefix=prefix)).tensors.keys() == load(tmp_path, nanogpt_file()).tensors.keys()


def test_tensors_are_views_on_the_file(tmp_path: Path) -> None:
    tensors = load(tmp_path, nanogpt_file()).tensors.values()
    assert not any(tensor.raw.flags.writeable or tensor.raw.flags.owndata for tensor in tensors)


def test_a_transposed_tensor_is_a_tensor(tmp_path: Path) -> None:
    """A matrix that was saved as the transpose of another's memory, as torch.save keeps it."""
    values = arrays()
    key = "transformer.h.0.mlp.c_fc.weight"
    model, storages = state_dict(values)
    index = str(list(values).index(key))
    storages[index] = np.ascontiguousarray(values[key].T).tobytes()
    model[key] = tensor(storage(index, values[key].size), (32, 8), (1, 32))
    data = archive(pickled({"model": model, "model_args": {**SIZES, "bias": True}}), storages)
    np.testing.assert_array_equal(load(tmp_path, data).tensors[key].float32(), values[key])


def test_a_parameter_is_a_tensor(tmp_path: Path) -> None:
    model, storages = state_dict(arrays())
    rebuild = name("torch._utils", "_rebuild_parameter")
    model = {key: call(rebuild, value, True, Raw(op({}))) for key, value in model.items()}
    load(tmp_path, archive(pickled({"model": model, "model_args": {**SIZES, "bias": True}}), storages))


def test_causal_masks_are_dropped(tmp_path: Path) -> None:
    values = arrays()
    values["transformer.h.0.attn.bias"] = np.ones((1, 1, 16, 16), "<f4")
    values["transformer.h.0.attn.masked_bias"] = np.ones((), "<f4")
    assert "transformer.h.0.attn.bias" not in load(tmp_path, nanogpt_file(values=values)).tensors


def test_a_head_with_the_embeddings_values_is_tied_and_another_is_kept(tmp_path: Path) -> None:
    values = arrays()
    wte = values["transformer.wte.weight"]
    for head, tied in ((wte.copy(), True), (wte + 1, False)):
        model, storages = state_dict({**values, "lm_head.weight": head})
        data = archive(pickled({"model": model, "model_args": {**SIZES, "bias": True}}), storages)
        checkpoint = load(tmp_path, data)
        assert checkpoint.config.tied is tied
        assert ("lm_head.weight" in checkpoint.tensors) is not tied


@pytest.mark.parametrize("kind", ["HalfStorage", "BFloat16Storage", "DoubleStorage"])
def test_other_floats(kind: str, tmp_path: Path) -> None:
    values = {key: np.round(value * 4) / 4 for key, value in arrays().items()}  # exact in all of them
    model, storages = state_dict(values)
    for i, (key, value) in enumerate(values.items()):
        model[key] = tensor(storage(str(i), value.size, name("torch", kind)), value.shape)
        storages[str(i)] = {
            "HalfStorage": value.astype("<f2"),
            "BFloat16Storage": (value.view("<u4") >> 16).astype("<u2"),
            "DoubleStorage": value.astype("<f8"),
        }[kind].tobytes()
    data = archive(pickled({"model": model, "model_args": {**SIZES, "bias": True}}), storages)
    checkpoint = load(tmp_path, data)
    for key, value in values.items():
        np.testing.assert_array_equal(checkpoint.tensors[key].float32(), value)


# -- tensors that lie -----------------------------------------------------------------------------------------

WPE = storage("1", 128)
F32 = name("torch", "FloatStorage")
LYING = {
    "strides of zero": tensor(WPE, (16, 8), (0, 0)),
    "one row for all": tensor(WPE, (16, 8), (0, 1)),
    "overlapping rows": tensor(WPE, (16, 8), (1, 1)),
    "gaps": tensor(WPE, (16, 8), (16, 1)),
    "a negative stride": tensor(WPE, (16, 8), (-8, 1)),
    "a negative offset": tensor(WPE, (16, 8), offset=-1),
    "an offset past the end": tensor(WPE, (16, 8), offset=1),
    "a huge offset": tensor(WPE, (16, 8), offset=2**47),
    "an offset that is true": tensor(WPE, (16, 8), offset=True),
    "an offset that is text": tensor(WPE, (16, 8), offset="0"),
    "a negative size": tensor(WPE, (-16, -8), (8, 1)),
    "a size of 2**70": tensor(WPE, (2**70, 8), (8, 1)),
    "a product that overflows": tensor(WPE, (2**32, 2**32), (2**32, 1)),
    "a shape that is a list": tensor(WPE, Raw(op([16, 8])), (8, 1)),
    "a shape that is a number": tensor(WPE, 128, (1,)),
    "too few strides": tensor(WPE, (16, 8), (1,)),
    "a thousand dimensions": tensor(WPE, (1,) * 1000, (1,) * 1000),
    "a storage larger than its member": tensor(storage("1", 2**40), (16, 8)),
    "a storage that is not there": tensor(storage("999", 128), (16, 8)),
    "a storage outside": tensor(storage("../1", 128), (16, 8)),
    "a storage with an absolute key": tensor(storage("/etc/passwd", 128), (16, 8)),
    "a storage with a number as key": tensor(storage(1, 128), (16, 8)),
    "a storage of -1": tensor(storage("1", -1), (16, 8)),
    "a storage of text": tensor(storage("1", "128"), (16, 8)),
    "a storage of an unknown class": tensor(storage("1", 128, "FloatStorage"), (16, 8)),
    "a storage that is a config": tensor(storage("1", 128, name("x", "GPTConfig")), (16, 8)),
    "an id that is no tuple": tensor(Raw(op("storage") + b"Q"), (16, 8)),
    "an id of another kind": tensor(Raw(op(("module", F32, "1", "cpu", 128)) + b"Q"), (16, 8)),
    "no storage": tensor(Raw(b"N"), (16, 8)),
    "no arguments": call(name("torch._utils", "_rebuild_tensor_v2")),
    "another tensor's memory": tensor(storage("0", 40), (16, 8)),
}


@pytest.mark.parametrize("lie", LYING.values(), ids=LYING)
def test_a_tensor_that_lies_is_refused(lie: Raw, tmp_path: Path) -> None:
    refused(tmp_path, with_tensor(lie))


def test_two_tensors_over_the_same_bytes_are_refused(tmp_path: Path) -> None:
    """Else a file of a kilobyte could be a model of a gigabyte."""
    key = "transformer.h.0.ln_1.weight"
    data = with_tensor(tensor(WPE, (16, 8)))
    model, storages = state_dict(arrays())
    model[key] = tensor(WPE, (8,))
    data = archive(pickled({"model": model, "model_args": {**SIZES, "bias": True}}), storages)
    assert "lie over each other" in refused(tmp_path, data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["transformer.wte.weight", "transformer.ln_f.bias"])
def test_nan_and_infinity_are_refused_by_the_tensors_name(value: float, key: str, tmp_path: Path) -> None:
    values = arrays()
    values[key].flat[-1] = value
    assert key in refused(tmp_path, nanogpt_file(values=values))


def test_weights_of_integers_are_refused(tmp_path: Path) -> None:
    long = tensor(storage("1", 64, name("torch", "LongStorage")), (16, 4))
    refused(tmp_path, with_tensor(long), CorruptCheckpoint)
    long = tensor(storage("1", 64, name("torch", "LongStorage")), (16, 8))
    refused(tmp_path, with_tensor(long), UnsupportedCheckpoint)


def test_what_is_missing_and_what_is_unknown_is_listed(tmp_path: Path) -> None:
    values = arrays()
    del values["transformer.h.0.ln_2.bias"]
    values["transformer.h.0.attn.rotary"] = np.ones(4, "<f4")
    message = refused(tmp_path, nanogpt_file(values=values), UnsupportedCheckpoint)
    assert "transformer.h.0.ln_2.bias is missing" in message
    assert "transformer.h.0.attn.rotary is not understood" in message


def test_a_shape_that_does_not_fit_the_configuration_is_named(tmp_path: Path) -> None:
    values = arrays()
    values["transformer.wpe.weight"] = values["transformer.wpe.weight"][:8]
    message = refused(tmp_path, nanogpt_file(values=values))
    assert "transformer.wpe.weight is [8, 8] instead of [16, 8]" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 10**9),
        ("n_layer", 2),
        ("n_layer", 0),
        ("n_layer", -1),
        ("n_layer", True),
        ("n_layer", 1.0),
        ("n_layer", None),
        ("n_head", 3),
        ("n_head", 0),
        ("n_embd", 2**40),
        ("block_size", 10**6),
        ("vocab_size", "5"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(field: str, value: object, tmp_path: Path) -> None:
    refused(tmp_path, nanogpt_file(model_args={**SIZES, "bias": True, field: value}), CheckpointError)


def test_a_configuration_that_is_incomplete_says_what_is_missing(tmp_path: Path) -> None:
    message = refused(tmp_path, nanogpt_file(model_args={"n_layer": 1, "n_head": 2}), UnsupportedCheckpoint)
    assert "n_embd, block_size, vocab_size" in message


def test_weights_alone_say_what_is_missing(tmp_path: Path) -> None:
    model, storages = state_dict(arrays())
    assert "bare weights" in refused(tmp_path, archive(pickled(model), storages), UnsupportedCheckpoint)
    no_args = archive(pickled({"model": model, "iter_num": 3}), storages)
    assert "neither nanoGPT's model_args" in refused(tmp_path, no_args, UnsupportedCheckpoint)


def test_a_whole_pickled_module_is_refused_by_its_class(tmp_path: Path) -> None:
    """torch.save(model) instead of torch.save(model.state_dict())."""
    data = archive(pickled(call(name("model", "GPT"))), {})
    message = refused(tmp_path, data, UnsafeCheckpoint)
    assert "model.GPT" in message
    assert "state_dict" in message


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    evil = call(name("posix", "system"), "touch /tmp/nanogpt-canary-that-must-not-exist")
    for value in (evil, {"model": evil}, {"model": {}, "optimizer": [evil]}):
        assert "posix.system" in refused(tmp_path, archive(pickled(value), {}), UnsafeCheckpoint)
    assert "posix.system" in refused(tmp_path, with_tensor(tensor(evil, (16, 8))), UnsafeCheckpoint)
    assert not Path("/tmp/nanogpt-canary-that-must-not-exist").exists()


@pytest.mark.parametrize(
    ("key", "project"),
    [
        ("transformer.h.0.attn.c_q.weight", "nanochat"),
        ("resid_lambdas", "nanochat"),
        ("blocks.0.attn.qkvo_w", "modded-nanogpt"),
        ("layers.0.feed_forward.w1.weight", "llama2.c"),
        ("model.layers.0.self_attn.q_proj.weight", "Llama"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "GPT-NeoX"),
    ],
)
def test_other_architectures_are_refused_by_name(key: str, project: str, tmp_path: Path) -> None:
    model, storages = state_dict({key: np.ones(4, "<f4")})
    for value in (model, {"model": model, "model_args": {**SIZES}}):
        assert f"is a {project} checkpoint" in refused(
            tmp_path, archive(pickled(value), storages), UnsupportedCheckpoint
        )


def test_modded_nanogpt_is_told_from_nanochat_by_what_it_saves(tmp_path: Path) -> None:
    """Both have c_q; modded-nanogpt saves its own source code beside the weights."""
    model, storages = state_dict({"transformer.h.0.attn.c_q.weight": np.ones(4, "<f4")})
    value = {"step": 1, "code": "import torch", "model": model, "optimizers": []}
    assert "modded-nanogpt" in refused(tmp_path, archive(pickled(value), storages), UnsupportedCheckpoint)


# -- zip files that lie ---------------------------------------------------------------------------------------


def test_compressed_members_are_refused_unread(tmp_path: Path) -> None:
    """A zip bomb: 200 MB of zeros in 200 kB. It is never decompressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("ckpt/data.pkl", bytes(200 << 20))
    assert "compressed" in refused(tmp_path, out.getvalue())


@pytest.mark.parametrize(
    "member", ["../evil", "/etc/passwd", "ckpt/../../evil", "C:\\evil", "ckpt/a\\b", "ckpt/\x1b[2J"]
)
def test_names_that_leave_the_archive_are_refused(member: str, tmp_path: Path) -> None:
    message = refused(tmp_path, archive(pickled({}), {}, **{member: b"x"}), UnsafeCheckpoint)
    assert message.isprintable()


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    """Which of the two is read would depend on the reader."""
    with pytest.warns(UserWarning, match="Duplicate"):
        data = archive(pickled({}), {}, **{"ckpt/data.pkl": b"x"})
    assert "two members" in refused(tmp_path, data)


def test_two_pickles_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, archive(pickled({}), {}, **{"other/data.pkl": b"N."}), UnsupportedCheckpoint)


def test_a_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("weights.npy", b"x")
    assert "data.pkl" in refused(tmp_path, out.getvalue(), UnsupportedCheckpoint)
    assert "data.pkl" in refused(tmp_path, b"PK\x05\x06" + bytes(18), UnsupportedCheckpoint)


def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    data = archive(pickled({}), {}, **{"ckpt/code/__torch__.py": b"x"})
    assert "TorchScript" in refused(tmp_path, data, UnsupportedCheckpoint)


def test_big_endian_files_are_refused_by_name(tmp_path: Path) -> None:
    assert "big-endian" in refused(tmp_path, archive(pickled({}), {}, byteorder=b"big"), UnsupportedCheckpoint)


def test_changed_weights_are_found_by_their_checksum(tmp_path: Path) -> None:
    data = nanogpt_file()
    at = data.index(arrays()["transformer.wpe.weight"].tobytes())
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    assert "checksum" in refused(tmp_path, damaged)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    load(tmp_path, without_checksums(nanogpt_file()))


def test_a_directory_that_lies_is_refused(tmp_path: Path) -> None:
    data = nanogpt_file()
    entry, second = directory_entries(data)[:2]
    end = data.rindex(b"PK\x05\x06")
    lies = {
        "encrypted": patched(data, entry + 8, "H", 1),
        "another method": patched(data, entry + 10, "H", 99),
        "packed and not": patched(data, entry + 20, "I", 5),
        "a size past the end": patched(patched(data, entry + 20, "I", 2**31), entry + 24, "I", 2**31),
        "a 64-bit size without one": patched(data, entry + 24, "I", 2**32 - 1),
        "the place of another": patched(data, second + 42, "I", 0),
        "a place past the end": patched(data, entry + 42, "I", 2**32 - 2),
        "a place in the middle": patched(data, entry + 42, "I", 7),
        "a name that is longer": patched(data, entry + 28, "H", 60_000),
        "no signature": patched(data, entry, "I", 0),
        "more entries": patched(patched(data, end + 8, "H", 60_000), end + 10, "H", 60_000),
        "fewer entries": patched(patched(data, end + 8, "H", 3), end + 10, "H", 3),
        "a part of several": patched(data, end + 4, "H", 1),
        "a directory that is larger": patched(data, end + 12, "I", 2**31),
        "a directory elsewhere": patched(data, end + 16, "I", 0),
        "a comment that is missing": patched(data, end + 20, "H", 9),
        "bytes behind it": data + b"x",
        "a locator of a 64-bit directory": data[:end] + b"PK\x06\x07" + struct.pack("<IQI", 0, 2**63, 1) + data[end:],
    }
    for what, lie in lies.items():
        message = refused(tmp_path, lie)
        assert "damaged" in message or "compressed" in message, what


def test_a_member_over_another_is_refused(tmp_path: Path) -> None:
    """Two entries whose ranges overlap: a directory may not count bytes twice."""
    data = nanogpt_file()
    first = directory_entries(data)[0]
    size = struct.unpack_from("<I", data, first + 24)[0]
    grown = patched(patched(data, first + 20, "I", size + 64), first + 24, "I", size + 64)
    assert "reaches into what follows" in refused(tmp_path, grown)


def test_64_bit_sizes_are_read(tmp_path: Path) -> None:
    """As PyTorch writes them for files of more than 4 GiB; here for every member."""
    out = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(nanogpt_file()))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for info in source.infolist():
            with file.open(zipfile.ZipInfo(info.filename), "w", force_zip64=True) as member:
                member.write(source.read(info))
    load(tmp_path, out.getvalue())
