"""Hugging Face folders, safetensors and llm.c files: what is read, and what is refused by name."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from checkpoint_files import (
    CHARACTERS,
    SIZES,
    Raw,
    archive,
    arrays,
    conv1d,
    hf_config,
    llmc_file,
    name,
    op,
    pickled,
    safetensors_file,
    state_dict,
    trained_here_file,
    write_huggingface,
    write_meta,
)

from nanogpt.chat_template import render
from nanogpt.checkpoint import Tensor, card, load_checkpoint, weights_sha256
from nanogpt.checkpoint import safetensors_file as product
from nanogpt.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, NanoGPTError, UnsupportedCheckpoint


def same_weights(folder: Path) -> None:
    for key, value in load_checkpoint(folder).tensors.items():
        np.testing.assert_array_equal(value.float32(), arrays()[key])


# -- Hugging Face ---------------------------------------------------------------------------------------------


def test_matrices_are_transposed_views(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path)
    same_weights(folder)
    raw = load_checkpoint(folder).tensors["transformer.h.0.mlp.c_fc.weight"].raw
    assert raw.shape == (32, 8)
    assert raw.flags.f_contiguous
    assert not raw.flags.owndata


def test_names_without_the_prefix(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path)
    values = {key.removeprefix("transformer."): value for key, value in conv1d(arrays()).items()}
    values["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), "<f4"))
    (folder / "model.safetensors").write_bytes(safetensors_file(values))
    same_weights(folder)


def shards(values: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    items = list(values.items())
    return [dict(items[:5]), dict(items[5:9]), dict(items[9:])]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_shards(kind: str, tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path)
    (folder / "model.safetensors").unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, part in enumerate(shards(conv1d(arrays())), 1):
        file = f"{stem}-{i:05}-of-00003.{kind}"
        weight_map.update(dict.fromkeys(part, file))
        if kind == "safetensors":
            data = safetensors_file(part)
        else:
            model, storages = state_dict(part)
            data = archive(pickled(model), storages, folder="pytorch_model")
        (folder / file).write_bytes(data)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    same_weights(folder)
    assert load_checkpoint(folder / f"{stem}-00002-of-00003.{kind}").path == folder

    (folder / f"{stem}-00002-of-00003.{kind}").unlink()
    with pytest.raises(CheckpointNotFound, match="00002"):
        load_checkpoint(folder)
    for lie in (
        {},
        [],
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "x" * 9999},
        {"a": "a\0b"},
        {"a": 1},
    ):
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": lie}))
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_fast", "gelu_tanh"), ("gelu", "gelu_erf")],
)
def test_the_gelu_is_the_configurations(name: str, activation: str, tmp_path: Path) -> None:
    assert load_checkpoint(write_huggingface(tmp_path, activation_function=name)).config.activation == activation


REFUSED: dict[str, Any] = {
    "model_type": "llama",
    "activation_function": "relu",
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "add_cross_attention": True,
    "layer_norm_epsilon": -1.0,
    "quantization_config": {"bits": 4},
    "n_head": "2",
    "n_layer": 1.0,
    "n_inner": "64",
}


@pytest.mark.parametrize(("key", "value"), REFUSED.items(), ids=REFUSED)
def test_variants_are_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=key):
        load_checkpoint(write_huggingface(tmp_path, **{key: value}))


def test_what_a_configuration_adds_is_kept(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path, layer_norm_epsilon=1e-6, n_inner=16)
    values = arrays()
    block = "transformer.h.0.mlp."
    values[block + "c_fc.weight"], values[block + "c_fc.bias"] = np.ones((16, 8), "<f4"), np.ones(16, "<f4")
    values[block + "c_proj.weight"] = np.ones((8, 16), "<f4")
    (folder / "model.safetensors").write_bytes(safetensors_file(conv1d(values)))
    config = load_checkpoint(folder).config
    assert (config.layer_norm_eps, config.n_inner) == (1e-6, 16)


def test_an_untied_head(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"lm_head\.weight is missing"):
        load_checkpoint(folder)
    head = np.ones((5, 8), "<f4")
    (folder / "model.safetensors").write_bytes(safetensors_file(conv1d(arrays()) | {"lm_head.weight": head}))
    checkpoint = load_checkpoint(folder)
    assert not checkpoint.config.tied
    np.testing.assert_array_equal(checkpoint.tensors["lm_head.weight"].float32(), head)
    (folder / "config.json").write_text(json.dumps(hf_config(tie_word_embeddings=True)))
    with pytest.raises(UnsupportedCheckpoint, match="tie_word_embeddings"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"a": NaN', "[" * 100_000, '"\\ud800"', "\xff"])
def test_a_broken_config(text: str, tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path)
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(folder)


def test_the_chat_template_of_a_folder(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path)
    assert load_checkpoint(folder).chat_template is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    assert load_checkpoint(folder).chat_template == "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert load_checkpoint(folder).chat_template == "{{ messages[-1].content }}"


def test_a_claim_of_no_biases_is_checked(tmp_path: Path) -> None:
    """What a conversion notes of a model without biases is believed only where the biases are zeros."""
    folder = write_huggingface(tmp_path, nano_gpt={"bias": False})
    with pytest.raises(CorruptCheckpoint, match="is not zero"):
        load_checkpoint(folder)


# -- safetensors ----------------------------------------------------------------------------------------------


def header_of(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def one(**entry: object) -> bytes:
    full = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    return header_of(json.dumps({"a": full}).encode(), bytes(8))


BROKEN = {
    "a huge header": struct.pack("<Q", 2**63) + b"{}",
    "a header of 100 MB": struct.pack("<Q", 100 << 20) + b"{" + bytes(1000),
    "a header past the end": struct.pack("<Q", 100) + b"{}",
    "no JSON": header_of(b"{'a'}"),
    "not UTF-8": header_of(b'{"\xff": 1}'),
    "UTF-16, which would load a codec": header_of('{"a": 1}'.encode("utf-16-le")),
    "nested too deeply": header_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a name twice": header_of(b'{"a": {}, "a": {}}'),
    "metadata of numbers": header_of(b'{"__metadata__": {"a": 1}}'),
    "metadata that is a list": header_of(b'{"__metadata__": []}'),
    "an entry that is a number": header_of(b'{"a": 1}'),
    "an entry that is empty": header_of(b'{"a": {}}'),
    "a dtype that is a list": one(dtype=["F32"]),
    "an unknown dtype": one(dtype="F8_E4M3"),
    "a shape that is a number": one(shape=2),
    "a shape of text": one(shape="2"),
    "a negative size": one(shape=[-2]),
    "a size that is true": one(shape=[True, 2]),
    "a size that is a fraction": one(shape=[2.0]),
    "an overflowing shape": one(shape=[2**40, 2**40]),
    "a thousand dimensions": one(shape=[1] * 1000 + [2]),
    "offsets that are negative": one(data_offsets=[-8, 0]),
    "offsets backwards": one(data_offsets=[8, 0]),
    "offsets past the end": one(data_offsets=[8, 16]),
    "one offset": one(data_offsets=[0]),
    "offsets of text": one(data_offsets="08"),
    "another size": one(data_offsets=[0, 4]),
    "bytes behind": one() + b"x",
    "an overlap": header_of(json.dumps({
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }).encode(), bytes(8)),
    "a hole": header_of(json.dumps({
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
    }).encode(), bytes(12)),
    "no tensors": header_of(b"{}"),
    "integers": header_of(b'{"wte.weight": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}', bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_safetensors(data: bytes, tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises((CorruptCheckpoint, UnsupportedCheckpoint)) as caught:
        load_checkpoint(folder)
    assert str(tmp_path) in str(caught.value)


def test_our_safetensors_are_read_by_their_library(tmp_path: Path) -> None:
    """Names in order, aligned, with metadata; bfloat16 and transposed views too."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    values = {"b": np.arange(6, dtype="<f4").reshape(2, 3), "a": np.arange(3, dtype="<f2"), "c": np.ones((2, 2), "<f8")}
    tensors = {
        "b": Tensor("float32", values["b"]),
        "a": Tensor("float16", values["a"]),
        "c": Tensor("float64", values["c"]),
        "t": Tensor("float32", values["b"].T),
        "bf": Tensor("bfloat16", np.array([0x3F80], "<u2")),
    }
    path = tmp_path / "x.safetensors"
    product.write(path, tensors, {"format": "pt"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("bf").tolist() == [1.0]
        for key in ("a", "b", "c"):
            np.testing.assert_array_equal(file.get_tensor(key).numpy(), values[key])
        np.testing.assert_array_equal(file.get_tensor("t").numpy(), values["b"].T)
    del tensors["bf"]
    product.write(path, tensors, {})
    assert load_file(path).keys() == tensors.keys()
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0


# -- llm.c ----------------------------------------------------------------------------------------------------


def test_llmc_files_without_their_padding(tmp_path: Path) -> None:
    meta = str(write_meta(tmp_path))
    path = tmp_path / "model.bin"
    for version, dtype in ((3, "float32"), (5, "bfloat16")):
        path.write_bytes(llmc_file(version=version))
        checkpoint = load_checkpoint(path, tokenizer=meta)
        assert checkpoint.config.vocab_size == len(CHARACTERS)
        for key, value in checkpoint.tensors.items():
            assert value.dtype == dtype
            np.testing.assert_allclose(value.float32(), arrays()[key], rtol=0 if version == 3 else 2**-7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 1}, "version 1"),
        ({"version": 2**31 - 1}, "versions 3"),
        ({"L": 2}, "a model of its header's shape"),
        ({"C": 16}, "a model of its header's shape"),
        ({"NH": 0}, "its header says"),
        ({"NH": 3}, "not a multiple"),
        ({"L": -1}, "its header says"),
        ({"L": 2**31 - 1}, "its header says"),
        ({"V": 9}, "its header says"),
        ({"maxT": 2**31 - 1, "C": 2**31 - 1}, "a model of its header's shape"),
    ],
)
def test_a_header_that_lies(changes: dict[str, int], words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(llmc_file(**changes))
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path, tokenizer=str(write_meta(tmp_path)))


# -- build-nanogpt and the guide's fork -----------------------------------------------------------------------


def build_nanogpt_file(module: str = "__main__", **more: object) -> bytes:
    model, storages = state_dict(arrays())
    config = Raw(name(module, "GPTConfig") + b")\x81" + op(dict(SIZES)) + b"b")
    return archive(pickled({"model": model, "config": config, "step": 3, "val_loss": 2.5, **more}), storages)


@pytest.mark.parametrize("module", ["__main__", "train_gpt2", "model.train_gpt2", "model.gpt", "anything.at.all"])
def test_a_config_of_any_module(module: str, tmp_path: Path) -> None:
    path = tmp_path / "model_00003.pt"
    path.write_bytes(build_nanogpt_file(module))
    checkpoint = load_checkpoint(path, tokenizer=str(write_meta(tmp_path)))
    assert (checkpoint.family, checkpoint.step, checkpoint.recorded_loss) == ("build-nanogpt", 3, 2.5)
    assert checkpoint.config.activation == "gelu_tanh"


def test_instructions_are_known_by_the_folder_or_the_loaders_state(tmp_path: Path) -> None:
    meta = str(write_meta(tmp_path))

    def template(folder: str, **more: object) -> str | None:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "model_00003.pt"
        path.write_bytes(build_nanogpt_file(**more))
        return load_checkpoint(path, tokenizer=meta).chat_template

    assert template("log") is None
    assert template("log", train_loader_state={"current_shard": 0, "current_position": 5}) is None
    assert template("log", train_loader_state={"current_position": 5}) is not None
    assert template("logs_finetune") is not None


def test_the_instruction_template_is_what_the_fork_trains_on(shared_checkpoints: Path) -> None:
    template = load_checkpoint(shared_checkpoints / "04_nano-gpt_fork" / "logs_finetune").chat_template
    assert template is not None
    question = {"role": "user", "content": "Who?"}
    plain = "### Instruction:\nWho?\n\n### Response:\n"
    assert render(template, [question], end_of_text="<|endoftext|>") == plain
    assert jinja2.Template(template).render(messages=[question], eos_token="<|endoftext|>") == plain
    system = {"role": "system", "content": "A play."}
    assert render(template, [system, question], end_of_text="<|endoftext|>") == (
        "### Instruction:\nWho?\n\n### Context:\nA play.\n\n### Response:\n"
    )
    answer = {"role": "assistant", "content": "I."}
    full = render(template, [question, answer, question], end_of_text="<|endoftext|>")
    assert full == plain + "I.<|endoftext|>" + plain


# -- trained here ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_our_own_brings_its_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "model_00007.pt"
    path.write_bytes(trained_here_file(padding=3))
    checkpoint = load_checkpoint(path)
    assert (checkpoint.family, checkpoint.step, checkpoint.recorded_loss) == ("nano-gpt-api", 7, 1.25)
    assert (checkpoint.config.vocab_size, checkpoint.config.num_tokens) == (8, 5)
    assert checkpoint.tokenizer.encode("abc") == [2, 3, 4]


HOSTILE_SPECS: dict[str, Any] = {
    "no kind": {},
    "an unknown kind": {"kind": "tiktoken"},
    "a kind that is a list": {"kind": []},
    "no characters": {"kind": "characters"},
    "characters that are a number": {"kind": "characters", "characters": 5},
    "characters that are lists": {"kind": "characters", "characters": [["a"]] * 5},
    "texts": {"kind": "characters", "characters": ["ab"] * 5},
    "too many": {"kind": "characters", "characters": [chr(0x4E00 + i) for i in range(99)]},
    "no file": {"kind": "llm.c"},
    "a file that is no text": {"kind": "llm.c", "file": 5},
    "a file that is not packed": {"kind": "huggingface", "file": "AAAA"},
    "a bomb": {"kind": "huggingface", "file": base64.b64encode(zlib.compress(bytes(129 << 20), 1)).decode()},
    "an end that is a list": {"kind": "huggingface", "eos_token": [], "name": [],
                              "file": base64.b64encode(zlib.compress(b"{}")).decode()},
}  # fmt: skip


@pytest.mark.parametrize("spec", HOSTILE_SPECS.values(), ids=HOSTILE_SPECS)
def test_a_tokenizer_in_a_file_may_be_anything(spec: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model_00007.pt"
    path.write_bytes(trained_here_file(tokenizer=spec))
    with pytest.raises(NanoGPTError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


# -- card and digest ------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_weights_not_of_the_file(tmp_path: Path) -> None:
    """As its docstring defines it, and the same for the same weights in another family's layout."""
    import hashlib

    expected = hashlib.sha256()
    for key, value in sorted(arrays().items()):
        expected.update(f"{key} {'x'.join(map(str, value.shape))}\n".encode() + value.tobytes())
    folder = write_huggingface(tmp_path)
    assert weights_sha256(load_checkpoint(folder)) == expected.hexdigest()
    path = tmp_path / "model_00003.pt"
    path.write_bytes(build_nanogpt_file())
    assert weights_sha256(load_checkpoint(path, tokenizer=str(write_meta(tmp_path)))) == expected.hexdigest()


def test_the_card_is_json(tmp_path: Path) -> None:
    described = card(load_checkpoint(write_huggingface(tmp_path)))
    assert json.loads(json.dumps(described)) == described
    assert described["parameters"] == sum(value.size for value in arrays().values())
    assert described["dtype"] == "float32"
