"""Fuzzing of the packed-weights reader: ``python tests/fuzz/packed_weights.py --seconds 300``.

Damaged files (bits and fields changed, cut, torn in the middle, pieces swapped, sizes and offsets at the edges of their
integers) go to ``read_packed``. What comes back must be nothing or the very bytes that were written. Half of the files
get a checksum that fits: then the reader may take them, and the model computes with whatever they hold, which may give
wrong numbers and must give no wrong address. An input is written down before it is tried, so a crash leaves it behind.

With atheris installed (PyPI), ``--atheris`` lets coverage of the reader choose the damage.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from tiny_model import tiny_checkpoint

from nanogpt import _kernels
from nanogpt.runner import native, native_cache

_WHAT, _WEIGHTS = b"w" * 32, b"d" * 32
_EDGES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_CHECKSUM_AT = native_cache._HEADER.size - 8


class Target:
    """A whole packed file of a small model of each kind, and what is asked of every damaged one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "input.packed"
        self.num_taken = 0
        checkpoint = tiny_checkpoint(n_head=3, n_embd=51, n_inner=77)
        self.config = native._native_config(checkpoint.config)
        self.kinds: list[list[int]] = []
        self.corpus: list[bytes] = []
        for kind in (0, 1, 2):
            kinds = [kind] * _kernels.num_matrices(self.config)
            whole = folder / f"{kind}.packed"
            native_cache._write(
                whole, _WHAT, _WEIGHTS, _kernels.packed_bytes(self.config, kinds),
                lambda memory, kinds=kinds: native.pack_into(memory, checkpoint, self.config, kinds, 1),
            )  # fmt: skip
            self.kinds.append(kinds)
            self.corpus.append(whole.read_bytes())

    def try_one(self, kind: int, content: bytes, *, mend: bool) -> None:
        """``mend``: put the checksum in that fits."""
        whole = self.corpus[kind]
        header_bytes = native_cache._HEADER_BYTES
        size = len(whole) - header_bytes
        if mend and len(content) >= header_bytes:
            checksum = _kernels.checksum(np.frombuffer(content, np.uint8)[header_bytes:])
            content = content[:_CHECKSUM_AT] + struct.pack("<Q", checksum) + content[_CHECKSUM_AT + 8 :]
        self.path.write_bytes(content)
        data = native_cache.read_packed(self.path, _WHAT, _WEIGHTS, size)
        if data is None:
            return
        self.num_taken += 1
        assert len(content) == len(whole), "a file of another size was taken"
        assert content[:_CHECKSUM_AT] == whole[:_CHECKSUM_AT], "a file with another header was taken"
        assert data.tobytes() == content[header_bytes:]
        if not mend:
            assert data.tobytes() == whole[header_bytes:], "damage went unnoticed"
        model = _kernels.Model(self.config, self.kinds[kind], data, 1, 1, native.chosen_isa())
        one = np.zeros(1, np.int32)
        model.step(one, one, one + 3, np.array([1, 2, 3], np.int32), [None], None)
        model.head(np.array([2], np.int32))


def damage(draw: random.Random, whole: bytes) -> bytes:
    """One to four changes."""
    content = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        if not content:
            break
        how = draw.randrange(7)
        at = draw.randrange(min(len(content), 128) if draw.random() < 0.5 else len(content))
        if how == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            content[at] = draw.choice((0, 127, 128, 255))
        elif how == 2:  # an integer at its edge: a size, an offset, an activation's limit
            width = draw.choice((4, 8))
            at -= at % width
            edge = (draw.choice(_EDGES) + draw.randint(-1, 1)) % 2 ** (8 * width)
            content[at : at + width] = edge.to_bytes(width, "little")
        elif how == 3:
            del content[at:]
        elif how == 4:  # torn: the rest was never written
            content[at:] = bytes(len(content) - at)
        elif how == 5:
            other, n = draw.randrange(len(content)), draw.choice((1, 64, 4096))
            content[at : at + n] = content[other : other + n]
        else:  # floats that are none: scales, biases, norms
            at -= at % 4
            content[at : at + 4] = struct.pack("<f", draw.choice((float("nan"), float("inf"), -1e38, 1e-45)))
    return bytes(content)


def run(seconds: float, seed: int) -> int:
    """Returns how many files were tried."""
    draw = random.Random(seed)
    count, end = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        for kind, whole in enumerate(target.corpus):
            target.try_one(kind, whole, mend=False)
        assert target.num_taken == len(target.corpus), "a whole file was not taken"
        while time.monotonic() < end:
            kind = draw.randrange(len(target.corpus))
            target.try_one(kind, damage(draw, target.corpus[kind]), mend=draw.random() < 0.5)
            count += 1
        print(f"{count} damaged files, of which {target.num_taken} had a checksum that fits and were computed with")
    return count


def run_atheris(seconds: float) -> None:
    import atheris

    with atheris.instrument_imports():
        pass
    atheris.instrument_func(native_cache.read_packed)
    target = Target(Path(tempfile.mkdtemp()))
    corpus = Path(tempfile.mkdtemp())
    for kind, whole in enumerate(target.corpus):
        (corpus / str(kind)).write_bytes(bytes([kind]) + whole)

    def one(data: bytes) -> None:
        if data:
            target.try_one(data[0] % 3, data[1:], mend=bool(data[0] & 128))

    limits = [f"-max_total_time={int(seconds)}", f"-max_len={max(map(len, target.corpus)) + 64}"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], one)
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--atheris", action="store_true", help="let coverage choose the damage")
    options = parser.parse_args()
    if options.atheris:
        run_atheris(options.seconds)
    else:
        print(f"seed {options.seed}")
        run(options.seconds, options.seed)
