"""A stack machine for pickles that knows data and nothing else: no import, no call, no lookup.

Python's own ``pickle.Unpickler`` can be told which globals to admit, but not how much memory a memo index or a count
may ask for, and every class that it admits is code that runs. Here a global is what ``find_global`` says, or the file
is refused. The number of instructions, depth, sizes and the shape of the result are bounded. Imports neither NumPy nor
PyTorch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from nanogpt.checkpoint.shown import shown
from nanogpt.errors import CorruptCheckpoint, UnsafeCheckpoint

# A checkpoint of GPT-2 XL with its optimizer has 60,000 opcodes and 250 kB; a vocabulary of 20,000 characters 170,000.
MAX_BYTES: Final = 32 << 20
MAX_OPCODES: Final = 1_000_000
MAX_MEMO: Final = 1_000_000
MAX_DEPTH: Final = 1_000  # open MARKs
MAX_LONG_BYTES: Final = 1_024
MAX_NAME: Final = 256
# Keys are hashed. Nested tuples make that exponential, chosen large integers make dict lookups linear; neither occurs.
MAX_INT_KEY: Final = 1 << 21


@dataclass(slots=True)
class Inert:
    """A stand-in for an object of a class that is not imported: its name, its arguments and its state as data."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def fields(self) -> dict[str, Any]:
        """The attributes that unpickling would have set."""
        merged: dict[str, Any] = {}
        for part in self.state if isinstance(self.state, tuple) else (self.state,):
            if isinstance(part, dict):
                merged.update({key: value for key, value in part.items() if isinstance(key, str)})
        return merged


@dataclass(frozen=True, slots=True)
class Admitted:
    """A global that a pickle may name. ``call`` makes a value of plain arguments; None: it can only be named."""

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None


def run(
    data: bytes,
    source: str,
    find_global: Callable[[str, str], Admitted | None],
    load_persistent: Callable[[Any], Any] | None,
) -> Any:
    """The value that the pickle describes: a tree of plain values, ``Inert`` and what ``Admitted.call`` makes.

    Raises: CorruptCheckpoint; UnsafeCheckpoint naming the global or the instruction that would run code.
    """
    if len(data) > MAX_BYTES:
        raise CorruptCheckpoint(f"{source} holds a pickle of more than {MAX_BYTES >> 20} MiB; none is that large.")
    value = _Machine(data, source, find_global, load_persistent).run()
    _check_is_tree(value, source)
    return value


def _check_is_tree(value: Any, source: str) -> None:
    """Refuses a value that is endless, or that is small only because its parts are shared.

    Ten tuples that each hold the one before twice are a thousand; sixty of them never end when somebody prints,
    compares or hashes the value. After this every walk over it is short.
    """
    left = MAX_OPCODES
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            parts: Iterable[Any] = item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            parts = item
        elif isinstance(item, Inert):
            parts = (item.args, item.state)
        else:
            continue
        before = len(waiting)
        waiting.extend(parts)
        left -= len(waiting) - before
        if left < 0:
            raise CorruptCheckpoint(f"{source} is damaged: the value in its pickle is endless.")


def check_key(value: Any) -> Any:
    """The value, if it may be a key of a dictionary or in a set. Raises: ValueError."""
    if isinstance(value, int) and not -MAX_INT_KEY < value < MAX_INT_KEY:
        raise ValueError("a key is too large an integer")
    if value is None or isinstance(value, (str, int, float, bytes)):
        return value
    raise ValueError(f"a key is neither text nor a number but a {type(value).__name__}")


class _Bad(Exception):
    """Why the pickle is damaged; turned into CorruptCheckpoint with its source."""


@dataclass(slots=True)
class _Machine:
    data: bytes
    source: str
    find_global: Callable[[str, str], Admitted | None]
    load_persistent: Callable[[Any], Any] | None
    pos: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    globals: dict[tuple[str, str], Admitted] = field(default_factory=dict)
    left: int = MAX_OPCODES

    def run(self) -> Any:
        try:
            return self._run()
        except _Bad as bad:
            reason = str(bad)
        except (IndexError, KeyError):
            reason = "it uses a value that it never made"
        except (struct.error, ValueError, TypeError, OverflowError) as error:
            reason = str(error)
        raise CorruptCheckpoint(f"{self.source} is damaged: its pickle is not readable at byte {self.pos}: {reason}.")

    def _run(self) -> Any:
        while True:
            self.spend(1)
            opcode = self.take(1)[0]
            if opcode == _STOP:
                if len(self.stack) != 1 or self.marks:
                    raise _Bad("it ends with values left over")
                return self.stack[0]
            action = _ACTIONS[opcode]
            if action is None:
                self.refuse_opcode(opcode)
            else:
                action(self)

    def spend(self, steps: int) -> None:
        """Everything that takes time is counted, so that no pickle takes long."""
        self.left -= steps
        if self.left < 0:
            raise _Bad(f"it takes more than {MAX_OPCODES:,} steps")

    def refuse_opcode(self, opcode: int) -> None:
        if opcode in _CALLING:
            raise UnsafeCheckpoint(
                f"{self.source} is not safe to read: its pickle uses the instruction {_CALLING[opcode]}, which makes"
                " objects of arbitrary classes. Nothing was executed.",
                remedy="Save plain dictionaries and tensors (torch.save of state_dict()).",
            )
        raise _Bad(f"unknown instruction 0x{opcode:02x} (protocol 0 is not read)")

    def take(self, count: int) -> bytes:
        end = self.pos + count
        if end > len(self.data):
            raise _Bad("it ends too early")
        piece = self.data[self.pos : end]
        self.pos = end
        return piece

    def number(self, code: struct.Struct) -> Any:
        return code.unpack(self.take(code.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.pos, self.pos + MAX_NAME)
        if end < 0:
            raise _Bad("a name does not end")
        text = self.data[self.pos : end].decode("utf-8")
        self.pos = end + 1
        return text

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def put(self, index: int) -> None:
        if index >= MAX_MEMO:
            raise _Bad(f"it numbers a value {index:,}")
        self.memo[index] = self.stack[-1]

    def push_global(self, module: str, name: str) -> None:
        if len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise _Bad("a name is too long")
        found = self.globals.get((module, name))
        if found is None:
            self.spend(_STEPS_A_NAME)
            found = self.find_global(module, name)
        if found is None:
            raise UnsafeCheckpoint(
                f"{self.source} is not safe to read: its pickle asks for {shown(module)}.{shown(name)}."
                " Nothing was executed.",
                remedy="Save plain dictionaries and tensors (torch.save of state_dict()); only load files you trust.",
            )
        self.globals[module, name] = found
        self.stack.append(found)

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Admitted) or not isinstance(args, tuple):
            raise _Bad("it calls something that is not a name")
        if function.call is None:
            raise _Bad(f"it calls {function.name}, which can only be named")
        self.spend(_STEPS_A_CALL)
        # A call may copy its first argument: a list that was made once must not be copied a million times.
        if args and isinstance(args[0], (list, tuple)):
            self.spend(len(args[0]))
        elif args and isinstance(args[0], str):
            self.spend(len(args[0]) // _TEXT_A_STEP)
        return function.call(args)

    # -- one method an instruction that does more than push a value

    def do_global(self) -> None:
        module = self.line()
        self.push_global(module, self.line())

    def do_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Bad("a name is not text")
        self.push_global(module, name)

    def do_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def do_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's own attributes (_metadata) say nothing of the weights
            raise _Bad(f"it sets the state of a {type(target).__name__}")

    def do_persistent(self) -> None:
        if self.load_persistent is None:
            raise _Bad("it refers to storages outside itself")
        self.stack[-1] = self.load_persistent(self.stack[-1])

    def do_mark(self) -> None:
        if len(self.marks) >= MAX_DEPTH:
            raise _Bad(f"it is nested deeper than {MAX_DEPTH:,}")
        self.marks.append(self.stack)
        self.stack = []

    def do_append(self) -> None:
        value = self.stack.pop()
        self.extend([value])

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise _Bad("it appends to something that is not a list")
        target.extend(values)

    def do_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise _Bad("it sets an item of something that is not a dictionary")
        for i in range(0, len(items), 2):
            target[check_key(items[i])] = items[i + 1]

    def do_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise _Bad("it adds to something that is not a set")
        target.update(check_key(item) for item in items)

    def do_long(self, size: int) -> None:
        if not 0 <= size <= MAX_LONG_BYTES:
            raise _Bad(f"an integer has {size:,} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def do_text(self, size: int) -> None:
        self.stack.append(self.take(size).decode("utf-8", "surrogatepass"))

    def do_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()


_U8, _U16, _U32, _U64 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q"))
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")
# What takes longer than pushing a value counts for more. GPT-2 XL with its optimizer: 5,000 calls, ten names.
_STEPS_A_CALL: Final = 15
_STEPS_A_NAME: Final = 100
_TEXT_A_STEP: Final = 256
_STOP: Final = ord(".")
_CALLING: Final = {ord("i"): "INST", ord("o"): "OBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
                   ord("P"): "PERSID"}  # fmt: skip


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _tuple(machine: _Machine, size: int) -> None:
    if len(machine.stack) < size:
        raise _Bad("it uses a value that it never made")
    machine.stack[-size:] = [tuple(machine.stack[-size:])]


_BY_OPCODE: Final[dict[int, Callable[[_Machine], Any]]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: says how much follows; the data's own end is the limit
    ord("("): _Machine.do_mark,
    ord("0"): _Machine.do_pop,
    ord("1"): lambda m: m.pop_mark(),
    ord("2"): lambda m: _push(m, m.stack[-1]),
    ord("N"): lambda m: _push(m, None),
    0x88: lambda m: _push(m, True),
    0x89: lambda m: _push(m, False),
    ord("J"): lambda m: _push(m, m.number(_I32)),
    ord("K"): lambda m: _push(m, m.number(_U8)),
    ord("M"): lambda m: _push(m, m.number(_U16)),
    0x8A: lambda m: m.do_long(m.number(_U8)),
    0x8B: lambda m: m.do_long(m.number(_I32)),
    ord("G"): lambda m: _push(m, m.number(_F64)),
    ord("X"): lambda m: m.do_text(m.number(_U32)),
    0x8C: lambda m: m.do_text(m.number(_U8)),
    0x8D: lambda m: m.do_text(m.number(_U64)),
    ord("B"): lambda m: _push(m, m.take(m.number(_U32))),
    ord("C"): lambda m: _push(m, m.take(m.number(_U8))),
    0x8E: lambda m: _push(m, m.take(m.number(_U64))),
    0x96: lambda m: _push(m, m.take(m.number(_U64))),  # BYTEARRAY8, as bytes
    ord("]"): lambda m: _push(m, []),
    ord(")"): lambda m: _push(m, ()),
    ord("}"): lambda m: _push(m, {}),
    0x8F: lambda m: _push(m, set()),
    0x91: lambda m: _push(m, frozenset(map(check_key, m.pop_mark()))),
    0x90: _Machine.do_additems,
    ord("a"): _Machine.do_append,
    ord("e"): lambda m: m.extend(m.pop_mark()),
    ord("s"): _Machine.do_setitem,
    ord("u"): lambda m: m.update(m.pop_mark()),
    ord("t"): lambda m: _push(m, tuple(m.pop_mark())),
    0x85: lambda m: _tuple(m, 1),
    0x86: lambda m: _tuple(m, 2),
    0x87: lambda m: _tuple(m, 3),
    ord("q"): lambda m: m.put(m.number(_U8)),
    ord("r"): lambda m: m.put(m.number(_U32)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: _push(m, m.memo[m.number(_U8)]),
    ord("j"): lambda m: _push(m, m.memo[m.number(_U32)]),
    ord("c"): _Machine.do_global,
    0x93: _Machine.do_stack_global,
    ord("R"): _Machine.do_reduce,
    0x81: _Machine.do_reduce,  # NEWOBJ: cls.__new__(cls, *args), here the same inert stand-in
    ord("b"): _Machine.do_build,
    ord("Q"): _Machine.do_persistent,
}
_ACTIONS: Final = [_BY_OPCODE.get(opcode) for opcode in range(256)]
