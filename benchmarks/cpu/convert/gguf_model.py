"""Write a Hugging Face GPT-2 folder as GGUF. Runs in a virtual environment that has ``gguf`` (and so NumPy).

    python gguf_model.py FOLDER OUT.gguf (Q8_0|Q4_0|F16) (tied|untied)

The same tensors, names and types as llama.cpp's own converter gives (matrices and the embedding quantized, position
embedding, norms and biases in float32). ``untied`` adds the head as a tensor of its own: llama.cpp repacks weights
for its fast kernels only where they are not also the embedding table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = np.memmap(path, np.uint8, "r")
    size = int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8 : 8 + size]))
    body = data[8 + size :]
    return {
        name: body[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def main(folder: Path, out: Path, type_name: str, head: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = read_safetensors(folder / "model.safetensors")
    kind = gguf.GGMLQuantizationType[type_name]
    file_types = {"Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "F16": "MOSTLY_F16"}

    writer = gguf.GGUFWriter(out, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType[file_types[type_name]])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges((folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])

    def add(name: str, tensor: np.ndarray) -> None:
        if tensor.ndim == 2 and name != "position_embd.weight":
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))

    for name, tensor in tensors.items():
        matrix = tensor.ndim == 2 and ".h." in name
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        add(new_name, np.ascontiguousarray(tensor.T) if matrix else tensor)
    if head == "untied":
        add("output.weight", tensors["transformer.wte.weight"])

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
