"""The models that every engine runs: Hugging Face folders with random weights from a fixed seed.

Speed does not depend on the weights' values, so nothing is downloaded; but greedy text of small random weights repeats
itself, and an engine that guesses from the text so far would gain what it never gains on real text. The position
embedding is therefore larger than usual: tokens then hardly ever follow one another in the same way twice.

Written with NumPy alone, so that making a model needs none of the engines. The tokenizer is a real byte-level BPE:
256 bytes, then pairs and triples of printable ASCII characters in a fixed order, then the end-of-text token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FORMAT = 2
"""Raise it when what is written below changes: cached models of another format are made again."""


@dataclass(frozen=True)
class Model:
    """``prefill`` is the prompt of workload W3 in tokens."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    prefill: int

    @property
    def matrix_weights(self) -> int:
        """Weights that one decode step reads: the matrices of the layers and the head."""
        return 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd


MODELS = {
    model.name: model
    for model in (
        Model("gpt2", n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024, prefill=896),
        Model("small", n_layer=6, n_head=6, n_embd=384, vocab_size=4096, block_size=512, prefill=480),
    )
}


def prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts. The first 256 ids and the last one (end of text) are left out."""
    draw = random.Random(seed)
    return [[draw.randrange(256, vocab_size - 1) for _ in range(length)] for _ in range(count)]


def make_model(model: Model, folder: Path) -> Path:
    """Write the model unless it is there already; return its folder."""
    stamp = folder / "made"
    wanted = f"{_FORMAT} {model}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    _write_config(model, folder)
    _write_tokenizer(model, folder)
    _write_safetensors(folder / "model.safetensors", list(_tensors(model)))
    stamp.write_text(wanted)
    return folder


def _write_config(model: Model, folder: Path) -> None:
    end = model.vocab_size - 1
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": end, "eos_token_id": end}))


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _write_tokenizer(model: Model, folder: Path) -> None:
    letters = _byte_letters()
    ascii_letters = letters[:94]
    pairs = [(a, b) for a in ascii_letters for b in ascii_letters]
    pairs += [(a + b, c) for a, b in pairs for c in ascii_letters]
    pairs = pairs[: model.vocab_size - 257]
    tokens = [*letters, *(a + b for a, b in pairs), "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in pairs)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))


def _tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """GPT-2's tensors under Hugging Face's names; matrices of the layers are ``[in, out]``."""
    draw = np.random.default_rng(0)
    width = model.n_embd

    def matrix(*shape: int, deviation: float = 0.02) -> np.ndarray:
        return draw.standard_normal(shape, dtype=np.float32) * np.float32(deviation)

    yield "transformer.wte.weight", matrix(model.vocab_size, width)
    yield "transformer.wpe.weight", matrix(model.block_size, width, deviation=0.1)
    for i in range(model.n_layer):
        block = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            yield f"{block}{norm}.weight", np.ones(width, np.float32)
            yield f"{block}{norm}.bias", np.zeros(width, np.float32)
        for name, shape in (
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("mlp.c_fc", (width, 4 * width)),
            ("mlp.c_proj", (4 * width, width)),
        ):
            yield f"{block}{name}.weight", matrix(*shape)
            yield f"{block}{name}.bias", np.zeros(shape[1], np.float32)
    yield "transformer.ln_f.weight", np.ones(width, np.float32)
    yield "transformer.ln_f.bias", np.zeros(width, np.float32)


def _write_safetensors(path: Path, tensors: list[tuple[str, np.ndarray]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            file.write(tensor.tobytes())
