"""How much memory loading takes, and how much time and memory the worst files may take.

Each runs in a process of its own: its peak is then its own, and the kernel ends it where it asks for too much.
"""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import Raw, archive, call, name, op, pickled, storage, tensor, write_huggingface, write_meta
from support import ROOT

MIB = 1 << 20
# Loads a file and reports: what it was, the peak of private memory that loading added, and the peak of file pages.
PROGRAM = """
import json, resource, sys
from nanogpt.checkpoint import load_checkpoint
from nanogpt.errors import NanoGPTError

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

load_checkpoint(sys.argv[2], tokenizer=sys.argv[3])  # imports, tokenizer
before = status("VmRSS"), status("RssFile")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
limit = int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + limit, status("VmSize") + limit))
try:
    checkpoint = load_checkpoint(sys.argv[1], tokenizer=sys.argv[3])
    outcome, message = "loaded", ""
except NanoGPTError as error:
    outcome, message = type(error).__name__, str(error)
peak, file = status("VmHWM") - before[0], status("RssFile") - before[1]
print(json.dumps({"outcome": outcome, "message": message, "peak": peak, "file": file}))
"""


def load_apart(path: Path, warm: Path, tokenizer: str, limit: int) -> dict[str, int | str]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(warm), tokenizer, str(limit)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    answer: dict[str, int | str] = json.loads(result.stdout)
    return answer


def large_fork_checkpoint(path: Path) -> int:
    """A file as the guide's fork writes it: 32 MB of weights, and two times that of optimizer.

    Returns the weights' size.
    """
    width, vocabulary, zeros = 256, 8192, {}
    shapes = {"transformer.wte.weight": (vocabulary, width), "transformer.wpe.weight": (64, width)}
    for i in range(8):
        for part, shape in {
            "ln_1": (width,), "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width), "ln_2": (width,),
            "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width),
        }.items():  # fmt: skip
            shapes[f"transformer.h.{i}.{part}.weight"], shapes[f"transformer.h.{i}.{part}.bias"] = shape, shape[:1]
    shapes["transformer.ln_f.weight"], shapes["transformer.ln_f.bias"] = (width,), (width,)

    def stored(key: str, shape: tuple[int, ...]) -> Raw:
        size = 1
        for n in shape:
            size *= n
        zeros[key] = bytes(4 * size)
        return tensor(storage(key, size), shape)

    model = {key: stored(f"m{i}", shape) for i, (key, shape) in enumerate(shapes.items())}
    weights = sum(map(len, zeros.values()))
    state = {
        i: {"exp_avg": stored(f"a{i}", shape), "exp_avg_sq": stored(f"b{i}", shape)}
        for i, shape in enumerate(shapes.values())
    }
    sizes = {"n_layer": 8, "n_head": 4, "n_embd": width, "block_size": 64, "vocab_size": vocabulary}
    config = Raw(name("__main__", "GPTConfig") + b")\x81" + op(sizes) + b"b")
    value = {"model": model, "optimizer": {"state": state}, "config": config, "step": 1, "val_loss": 9.0}
    path.write_bytes(archive(pickled(value), zeros))
    return weights


def test_loading_takes_the_model_and_one_tensor(tmp_path: Path) -> None:
    """Rule 2. The optimizer, two thirds of the file, is not even touched; the weights are pages of the file."""
    path = tmp_path / "model_00001.pt"
    weights = large_fork_checkpoint(path)
    assert path.stat().st_size > 3 * weights
    characters = tmp_path / "characters.json"
    characters.write_text(json.dumps({"characters": [chr(0x4E00 + i) for i in range(8192)]}))
    largest = 8192 * 256 * 4
    measured = load_apart(path, path, str(characters), path.stat().st_size + 256 * MIB)
    assert measured["outcome"] == "loaded", measured["message"]
    assert int(measured["peak"]) < weights + largest
    assert int(measured["peak"]) - int(measured["file"]) < largest


def test_the_fork_fixture_takes_less_than_its_file(shared_checkpoints: Path, tmp_path: Path) -> None:
    path = shared_checkpoints / "04_nano-gpt_fork" / "log" / "model_00100.pt"
    measured = load_apart(path, shared_checkpoints / "03_build_nanogpt" / "log", "gpt2", 256 * MIB)
    assert measured["outcome"] == "loaded", measured["message"]
    weights = 813_504 * 4
    assert int(measured["peak"]) < weights + 50304 * 16 * 4
    assert path.stat().st_size > 3 * weights - 200_000


def many(values: bytes, each: bytes, size: int = 30 * MIB) -> bytes:
    return b"\x80\x02" + values + each * ((size - len(values)) // len(each)) + b"."


TENSOR = name("torch._utils", "_rebuild_tensor_v2") + b"q\x000"
ARGS = op((storage("0", 16), 0, (16,), (1,), False, {})) + b"q\x010"
# Each is made by its test: together they take seconds and hundreds of megabytes, which every collection would pay.
BOMBS: dict[str, Callable[[], bytes]] = {
    "dictionaries": lambda: many(b"(", b"}"),
    "lists in lists": lambda: many(b"", b"]"),
    "marks": lambda: many(b"", b"("),
    "memo": lambda: many(b"N", b"q\x00r\xff\xff\x0f\x00"),
    "texts": lambda: many(b"(", op("x" * 8)),
    "one long text": lambda: b"\x80\x02" + op("\U0001f642" + "x" * (30 * MIB)) + b".",
    "integers": lambda: many(b"(", b"\x8a\x40" + b"\x7f" * 64),
    "names": lambda: many(b"(", name("a", "Config")),
    "new names": lambda: b"\x80\x02(" + b"".join(name(f"a{i}", "Config") for i in range(500_000)) + b".",
    "objects": lambda: many(name("a", "Config") + b"q\x000(", b"h\x00)\x81"),
    "tensors": lambda: many(TENSOR + ARGS + b"(", b"h\x00h\x01R"),
    "storages": lambda: many(op(("storage", name("torch", "FloatStorage"), "0", "cpu", 1)) + b"q\x000(", b"h\x00Q"),
    "copies": lambda: many(
        b"]q\x00(" + b"N" * 200_000 + b"e0" + name("builtins", "frozenset") + b"q\x010(", b"h\x01h\x00\x85R"
    ),
    "colliding keys": lambda: b"\x80\x02}(" + b"".join(op(i << 20) + b"N" for i in range(-1, 1)) * 400_000 + b"u.",
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_bombs_end_in_bounded_time_and_memory(make: Callable[[], bytes], tmp_path: Path) -> None:
    """As meta.pkl or as data.pkl: 30 MB of the worst, at most 600 MB of memory, seconds of a processor at the most."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes(archive(make(), {"0": bytes(64)}))
    warm = write_huggingface(tmp_path / "hf")
    measured = load_apart(path, warm, str(write_meta(tmp_path)), 600 * MIB)
    assert measured["outcome"] in ("CorruptCheckpoint", "UnsafeCheckpoint", "UnsupportedCheckpoint")


def test_headers_that_are_bombs(tmp_path: Path) -> None:
    meta = str(write_meta(tmp_path))
    folder = write_huggingface(tmp_path / "hf")
    warm = write_huggingface(tmp_path / "warm")
    entry = b'"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]},'
    deep = b'{"a":' + b"[" * (4 * MIB - 100) + b"1}"
    wide = b"{" + b"".join(entry % i for i in range(60_000))[:-1] + b"}"
    for header in (deep, wide, b"{" + b" " * (4 * MIB - 100) + b"}", b'{"a":' + b"9" * (4 * MIB - 100) + b"}"):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        assert load_apart(folder, warm, meta, 600 * MIB)["outcome"] in ("CorruptCheckpoint", "UnsupportedCheckpoint")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(archive(pickled(call(name("collections", "OrderedDict"))), {}))
    (folder / "config.json").write_bytes(b"[" * (4 * MIB - 100))
    assert load_apart(folder, warm, meta, 600 * MIB)["outcome"] == "CorruptCheckpoint"


def test_this_machine_can_measure() -> None:
    """The tests above depend on it."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    assert Path("/proc/self/clear_refs").exists()
