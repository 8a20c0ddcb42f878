"""Small checkpoints of every family for tests, and files that lie. Written by hand: nothing of the product is used."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CHARACTERS = "\n abc"
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": len(CHARACTERS)}


def shapes(*, bias: bool = True, n_layer: int = 1) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model of ``SIZES`` in nanoGPT's layout."""
    c, result = 8, {"transformer.wte.weight": (len(CHARACTERS), 8), "transformer.wpe.weight": (16, 8)}
    for i in range(n_layer):
        for name, shape in {
            "ln_1": (c,),
            "attn.c_attn": (3 * c, c),
            "attn.c_proj": (c, c),
            "ln_2": (c,),
            "mlp.c_fc": (4 * c, c),
            "mlp.c_proj": (c, 4 * c),
        }.items():
            result[f"transformer.h.{i}.{name}.weight"] = shape
            if bias:
                result[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    result["transformer.ln_f.weight"] = (c,)
    if bias:
        result["transformer.ln_f.bias"] = (c,)
    return result


def arrays(*, bias: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype("<f4") for name, shape in shapes(bias=bias).items()}


def write_meta(folder: Path) -> Path:
    stoi = {character: i for i, character in enumerate(CHARACTERS)}
    meta = {"vocab_size": len(CHARACTERS), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
    path = folder / "meta.pkl"
    path.write_bytes(pickle.dumps(meta))
    return path


# -- torch.save by hand ---------------------------------------------------------------------------------------


class Raw(bytes):
    """Instructions of a pickle, put in as they are."""


def op(value: Any) -> bytes:
    """Instructions (protocol 2) that leave the value on the stack."""
    if isinstance(value, Raw):
        return bytes(value)
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes((len(data),)) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(op, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(op, value)) + b"e"
    assert isinstance(value, dict)
    return b"}(" + b"".join(op(key) + op(item) for key, item in value.items()) + b"u"


def name(module: str, attribute: str) -> Raw:
    return Raw(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n")


def call(function: Raw, *args: Any) -> Raw:
    return Raw(function + op(args) + b"R")


def storage(key: Any, numel: Any, kind: Any = None) -> Raw:
    return Raw(op(("storage", kind or name("torch", "FloatStorage"), key, "cpu", numel)) + b"Q")


def tensor(stored: Raw, shape: Any, strides: Any = None, offset: Any = 0) -> Raw:
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), stored, offset, shape, strides, False, hooks)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + op(value) + b"."


def archive(
    data: bytes, storages: Mapping[str, bytes], *, folder: str = "ckpt", byteorder: bytes = b"little", **more: bytes
) -> bytes:
    """The zip that torch.save writes around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        file.writestr(f"{folder}/data.pkl", data)
        file.writestr(f"{folder}/byteorder", byteorder)
        for key, content in storages.items():
            info = zipfile.ZipInfo(f"{folder}/data/{key}")
            padding = -(out.tell() + 30 + len(info.filename) + 4) % 64  # as torch.save aligns them
            info.extra = struct.pack("<2H", 0x4246, padding) + b"Z" * padding
            file.writestr(info, content)
        file.writestr(f"{folder}/version", b"3\n")
        for member, content in more.items():
            file.writestr(member, content)
    return out.getvalue()


def directory_entries(data: bytes) -> list[int]:
    """Where the entries of a zip's directory begin."""
    found, at = [], data.find(b"PK\x01\x02")
    while at >= 0:
        found.append(at)
        at = data.find(b"PK\x01\x02", at + 4)
    return found


def patched(data: bytes, at: int, code: str, value: int) -> bytes:
    """The bytes with a number put at a place."""
    return data[:at] + struct.pack("<" + code, value) + data[at + struct.calcsize("<" + code) :]


def without_checksums(data: bytes) -> bytes:
    """As torch.serialization.set_crc32_options(False) writes a file: zeros in their place."""
    for at in directory_entries(data):
        data = patched(data, at + 16, "I", 0)
    return data


def state_dict(values: Mapping[str, np.ndarray], prefix: str = "") -> tuple[dict[str, Raw], dict[str, bytes]]:
    """A state dict of float32 tensors, and the storages that it refers to."""
    model, storages = {}, {}
    for i, (key, value) in enumerate(values.items()):
        storages[str(i)] = value.tobytes()
        model[prefix + key] = tensor(storage(str(i), value.size), value.shape)
    return model, storages


def nanogpt_file(
    *, bias: bool = True, prefix: str = "", values: Mapping[str, np.ndarray] | None = None, **changes: Any
) -> bytes:
    """The bytes of a small nanoGPT checkpoint. ``changes`` replace entries of the dictionary that is saved."""
    model, storages = state_dict(arrays(bias=bias) if values is None else values, prefix)
    model[prefix + "lm_head.weight"] = model[prefix + "transformer.wte.weight"]
    value = {
        "model": model,
        "model_args": {**SIZES, "bias": bias, "dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": 1.25,
        "config": {"dataset": "letters"},
    }
    value.update(changes)
    return archive(pickled({key: item for key, item in value.items() if item is not ...}), storages)


def trained_here_file(*, padding: int = 0, tokenizer: Any = None, **changes: Any) -> bytes:
    """The bytes of a small checkpoint as nanogpt.train writes it, with its tokenizer in it."""
    values = arrays()
    values["transformer.wte.weight"] = np.vstack([values["transformer.wte.weight"], np.ones((padding, 8), "<f4")])
    model, storages = state_dict(values)
    config = {**SIZES, "vocab_size": 5 + padding, "num_tokens": 5, "bias": True, "activation": "gelu_tanh",
              "tied": True, "n_inner": 32, "layer_norm_eps": 1e-5}  # fmt: skip
    value = {
        "format": 1,
        "model": model,
        "config": {**config, **changes},
        "step": 7,
        "val_loss": 1.25,
        "tokenizer": {"kind": "characters", "characters": list(CHARACTERS)} if tokenizer is None else tokenizer,
        "chat_template": None,
    }
    return archive(pickled(value), storages)


def write_nanogpt(folder: Path, **changes: Any) -> Path:
    """A small nanoGPT checkpoint with its meta.pkl."""
    folder.mkdir(parents=True, exist_ok=True)
    write_meta(folder)
    path = folder / "ckpt.pt"
    path.write_bytes(nanogpt_file(**changes))
    return path


# -- the other families ---------------------------------------------------------------------------------------


def safetensors_file(values: Mapping[str, np.ndarray], dtype: str = "F32", **header_changes: Any) -> bytes:
    header: dict[str, Any] = {}
    offset = 0
    for key, value in values.items():
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    header.update(header_changes)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(value.tobytes() for value in values.values())


def conv1d(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's layout: matrices of the blocks as [in, out]."""
    return {
        key: np.ascontiguousarray(value.T) if ".h." in key and value.ndim == 2 else value
        for key, value in values.items()
    }


def hf_config(**changes: Any) -> dict[str, Any]:
    config = {"model_type": "gpt2", "activation_function": "gelu_new", **SIZES, "n_positions": 16}
    del config["block_size"]
    config.update(changes)
    return config


def write_huggingface(folder: Path, **changes: Any) -> Path:
    """A small Hugging Face folder with the characters as its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors_file(conv1d(arrays())))
    (folder / "config.json").write_text(json.dumps(hf_config(**changes)))
    (folder / "characters.json").write_text(json.dumps({"characters": list(CHARACTERS)}))
    return folder


def llmc_file(*, version: int = 3, magic: int = 20240326, padded: int = 8, **changes: int) -> bytes:
    """The bytes of a small llm.c model."""
    fields = {"maxT": 16, "V": len(CHARACTERS), "L": 1, "NH": 2, "C": 8, "Vp": padded} | changes
    header = np.zeros(256, "<i4")
    header[:8] = [magic, version, *fields.values()]
    values = arrays()
    values["transformer.wte.weight"] = np.vstack([values["transformer.wte.weight"], np.zeros((padded - 5, 8), "<f4")])
    if version == 5:
        return header.tobytes() + b"".join((v.view("<u4") >> 16).astype("<u2").tobytes() for v in values.values())
    return header.tobytes() + b"".join(value.tobytes() for value in values.values())


# -- nothing is executed --------------------------------------------------------------------------------------

_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "subprocess.",
              "exec", "compile", "pickle.", "import", "ctypes.", "socket.", "marshal.", "shutil.")  # fmt: skip
_watching: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    if event.startswith(_FORBIDDEN) or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")):
        _watching.append(f"{event} {args!r}"[:200])


sys.addaudithook(_hook)


@contextmanager
def executing_nothing() -> Iterator[None]:
    """Fails when anything inside runs a program, imports, compiles, unpickles, connects or writes."""
    global _watching
    _watching = events = []
    try:
        yield
    finally:
        _watching = None
    assert not events, events
