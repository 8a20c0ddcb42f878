"""The pickle reader: what training scripts write is read, and nothing that a pickle can say is ever executed."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import Raw, call, executing_nothing, name, op, pickled

from nanogpt.checkpoint.pickle_machine import MAX_BYTES, Inert
from nanogpt.checkpoint.safe_pickle import load_plain, loads
from nanogpt.errors import CheckpointNotFound, CorruptCheckpoint, UnsafeCheckpoint

PLAIN = [
    None,
    True,
    0,
    -1,
    255,
    65_535,
    -(2**31),
    2**63,
    -(10**50),
    1.5,
    "",
    "naïve 你好 🙂",
    "x" * 300,
    b"",
    b"\x00\xff" * 200,
    [],
    [1, [2, [3]]],
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    {},
    {"a": 1, 2: "b", None: 3, 1.5: 4, b"k": 5, True: 6},
    {1, 2},
    frozenset("ab"),
    {"vocab_size": 2, "stoi": {"a": 0, "b": 1}, "itos": {0: "a", 1: "b"}},
    collections.OrderedDict([("b", 1), ("a", 2)]),
    list(range(3000)),
    random.Random(1).getstate(),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=[f"{type(value).__name__}{i}" for i, value in enumerate(PLAIN)])
def test_plain_values_are_read_as_pickle_reads_them(value: object, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol), source="x") == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [np.float32(1.5), np.float64(-2.25), np.int64(7), np.int32(-7), np.bool_(True)])
def test_numpy_scalars_become_numbers(value: np.generic, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol), source="x") == value.item()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_random_states_and_arrays_are_inert(protocol: int) -> None:
    """The guide's fork saves NumPy's random state; a new-style generator is admitted as well."""
    for value in (
        np.random.RandomState(3).get_state(),
        np.random.default_rng(0),
        np.random.Generator(np.random.Philox(1)),
        np.arange(4),
    ):
        loads(pickle.dumps({"rng": value}, protocol), source="x")


class GPTConfig:
    def __init__(self) -> None:
        self.n_layer = 12


def test_a_config_object_is_read_without_its_class() -> None:
    """build-nanogpt pickles its GPTConfig, whose module does not exist here."""
    data = pickle.dumps(GPTConfig()).replace(__name__.encode(), b"x" * len(__name__))
    config = loads(data, source="x")
    assert isinstance(config, Inert)
    assert config.name == "x" * len(__name__) + ".GPTConfig"
    assert config.fields() == {"n_layer": 12}


class _System:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {CANARY}",)


CANARY = "/tmp/nanogpt-canary-that-must-not-exist"
EVIL = {
    "os.system": pickle.dumps(_System(), 2),
    "os.system in protocol 4": pickle.dumps(_System(), 4),
    "os.system in a list in a dict": pickle.dumps({"model": [1, {"x": _System()}]}),
    "eval": pickled(call(name("builtins", "eval"), "1")),
    "exec by its old name": pickled(call(name("__builtin__", "exec"), "1")),
    "getattr": pickled(call(name("builtins", "getattr"), "x", "y")),
    "a nested reduce": pickled(call(Raw(call(name("operator", "attrgetter"), "system")), name("os", "path"))),
    "a dotted name": b"\x80\x04" + op("x") + op("GPTConfig.__init__.__globals__") + b"\x93.",
    "importing": pickled(call(name("importlib", "import_module"), "os")),
    "torch's own loader": pickled(call(name("torch.storage", "_load_from_bytes"), "x")),
    "a module of a user": pickled(call(name("__main__", "GPT"))),
    "runpy": pickled(call(name("runpy", "run_path"), "x")),
    "INST": b"(" + op("x") + b"ios\nsystem\n.",
    "OBJ": b"(" + op("x") + b"o.",
    "NEWOBJ_EX": b"\x80\x04" + name("x", "GPTConfig") + b")}\x92.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": b"P0\n.",
}


@pytest.mark.parametrize("data", EVIL.values(), ids=EVIL)
def test_code_is_refused_and_not_executed(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(data)
    with executing_nothing(), pytest.raises(UnsafeCheckpoint, match=r"Nothing was executed") as caught:
        load_plain(path)
    assert str(path) in str(caught.value)
    assert not Path(CANARY).exists()


def test_the_refusal_names_the_global() -> None:
    with pytest.raises(UnsafeCheckpoint, match=r"asks for posix\.system"):
        loads(EVIL["os.system"], source="x")


def test_a_name_cannot_write_to_the_terminal() -> None:
    with pytest.raises(UnsafeCheckpoint) as caught:
        loads(pickled(name("os\x1b[2J", "sys\u202etem")), source="x")
    assert str(caught.value).isprintable()


def doubled(levels: int, end: bytes = b".") -> bytes:
    """A tuple of twice the tuple of twice …: small, and endless for whoever walks over it."""
    return b"\x80\x02)" + b"q\x00h\x00\x86" * levels + end


def copied(times: int) -> bytes:
    """One list of 100,000, from which dictionaries are made again and again."""
    many = b"]q\x00(" + b"N" * 100_000 + b"e0"
    again = name("builtins", "frozenset") + b"q\x010"
    return b"\x80\x02" + many + again + b"]" + b"h\x01h\x00\x85Ra" * times + b"."


DAMAGED = {
    "empty": b"",
    "only a protocol": b"\x80\x02",
    "no end": b"\x80\x02N",
    "two values": b"\x80\x02NN.",
    "no value": b"\x80\x02.",
    "an open mark": b"\x80\x02(N.",
    "protocol 0": pickle.dumps({"a": 1}, 0),
    "text": b"hello, world\n",
    "pop from nothing": b"\x80\x020.",
    "a mark that is missing": b"\x80\x02t.",
    "a memo that is missing": b"\x80\x02h\x07.",
    "a memo index of 2**31": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a memo index of 2**32 - 1": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo without a value": b"\x80\x02q\x00.",
    "bytes of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "text of 2**63": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b".",
    "text of 4 GiB": b"\x80\x02X\xff\xff\xff\xff.",
    "a bytearray of 2**63": b"\x80\x05\x96" + struct.pack("<Q", 2**63) + b".",
    "an integer of 2**31 - 1 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "an integer of -1 bytes": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "an integer of 10 MB": b"\x80\x02\x8b" + struct.pack("<i", 10**7) + b"\x01" * 10**7 + b".",
    "not UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "append to a tuple": b"\x80\x02)Na.",
    "append to nothing": b"\x80\x02Na.",
    "items without a value": b"\x80\x02}(Nu.",
    "items of a list": b"\x80\x02](NNu.",
    "add to a list": b"\x80\x04](N\x90.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a huge integer as a key": b"\x80\x02}" + op(2**61 - 1) + b"Ns.",
    "a set of lists": b"\x80\x04\x8f(]\x90.",
    "state of a list": b"\x80\x02]}b.",
    "state of a name": b"\x80\x02" + name("x", "GPTConfig") + b"}b.",
    "calling data": b"\x80\x02N)R.",
    "calling with data": b"\x80\x02" + name("x", "GPTConfig") + b"NR.",
    "calling what can only be named": pickled(call(name("numpy", "ndarray"), 1)),
    "an OrderedDict of numbers": pickled(call(name("collections", "OrderedDict"), [1, 2])),
    "a set of a number": pickled(call(name("builtins", "set"), 7)),
    "encode without arguments": pickled(call(name("_codecs", "encode"))),
    "encode as something else": pickled(call(name("_codecs", "encode"), "x", "rot13")),
    "persistent ids": b"\x80\x02NQ.",
    "a name that does not end": b"\x80\x02c" + b"x" * 10_000,
    "a name that is not text": b"\x80\x04NN\x93.",
    "an unknown instruction": b"\x80\x02\xff.",
    "tuples as keys": b"\x80\x02}" + doubled(60, b"Ns.")[2:],
    "tuples that are endless": doubled(60),
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "lists of each other": b"\x80\x02]q\x00]q\x01h\x00ah\x01a.",
    "a million instructions too many": b"\x80\x02" + b"N0" * 1_000_000 + b"N.",
    "marks": b"\x80\x02" + b"(" * 3_000_000,
    "a set of a list a hundred thousand times": copied(100_000),
    "a text encoded a hundred thousand times": b"\x80\x02X" + struct.pack("<I", 10**7) + b"a" * 10**7 + b"q\x000"
    + name("_codecs", "encode") + b"q\x010]" + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86Ra" * 100_000 + b".",
    "more than is ever written": b"\x80\x02" + b"N" * MAX_BYTES,
}  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damage_and_bombs_are_refused(data: bytes) -> None:
    with executing_nothing(), pytest.raises(CorruptCheckpoint) as caught:
        loads(data, source="meta.pkl")
    assert str(caught.value).startswith("meta.pkl ")
    assert len(str(caught.value)) < 400


def test_deep_nesting_is_data() -> None:
    """Half a million lists in each other: no recursion here, whatever the depth."""
    value = loads(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", source="x")
    for _ in range(299_999):
        (value,) = value
    assert value == []


def test_every_truncation_of_a_pickle_is_refused() -> None:
    data = pickle.dumps({"stoi": {"a": 0, "b": 1}, "itos": {0: "a", 1: "b"}, "n": [1.5, 2**70, (1, 2, 3)]})
    for end in range(len(data)):
        with pytest.raises(CorruptCheckpoint):
            loads(data[:end], source="x")


def test_what_pickle_reads_beyond_the_end_is_ignored_as_there() -> None:
    data = pickle.dumps([1, 2])
    assert loads(data + b"more", source="x") == pickle.load(io.BytesIO(data + b"more"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"nothing\.pkl"):
        load_plain(tmp_path / "nothing.pkl")
    with pytest.raises(CheckpointNotFound, match="Cannot read"):
        load_plain(tmp_path)
