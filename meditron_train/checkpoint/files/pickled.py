"""Read a pickle as data. Nothing in it is looked up, imported or called.

A pickle is a program for a stack machine, and Python's own machine resolves the names in it and calls what they name.
This one knows the instructions that plain data needs (protocols 2 to 5). A name must be on the reader's list, as an
exact pair of module and name, and what the list gives for it is ours: a constant, or a `Constructor` that makes a value
of ours. Reference: the standard library's `pickletools`, which documents every instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from meditron_train.log import printable

# Containers, strings and memo entries of one pickle: 5 million take about 500 MB. The metadata of a 70B model on 128
# ranks has about half a million.
_MAX_OBJECTS = 5_000_000
_MAX_KEY_ITEMS = 64  # of a tuple that is a key
# Keys that are neither text nor small numbers: their hashes are not random, so that many could be made to collide.
_MAX_CHOSEN_KEYS = 5_000
_SMALL = 1 << 20
_MAX_SHOWN = 80
_MAX_SHOWN_BITS = 256


class DamagedPickle(ValueError):
    """The bytes are not a pickle of plain data: cut off, or with instructions that such data does not need."""


class ForbiddenGlobal(ValueError):
    """The pickle names something that is not on the list: loading it elsewhere could run code."""


@dataclass(frozen=True)
class Constructor:
    """What a pickle may call: `make` gets the arguments as they are in the pickle and must trust none of them."""

    make: Callable[..., Any]


class Opaque:
    """Takes the place of an object that a pickle describes: its name there, its arguments, its state. Does nothing."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __repr__(self) -> str:
        return f"<{self.name}>"


def opaque(module: str, name: str) -> Constructor:
    """A constructor of inert objects that remember their arguments."""
    return Constructor(lambda *arguments: Opaque(f"{module}.{name}", arguments))


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """As Python 2 wrote it, with its items; Python 3 sets them afterwards."""
    if type(pairs) not in (list, tuple) or any(
        type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs
    ):
        raise DamagedPickle("an OrderedDict of something else than pairs")
    return {_key(key): value for key, value in pairs}


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    if type(numbers) not in (list, tuple):
        raise DamagedPickle(f"a torch.Size of {type(numbers).__name__}")
    return tuple(numbers)


ORDERED_DICT, SIZE = Constructor(_ordered_dict), Constructor(_size)

Allowed = Mapping[tuple[str, str], Any]


def read_pickle(
    raw: bytes, allowed: Allowed, persistent: Callable[[Any], Any] | None = None, start: int = 0
) -> tuple[Any, int]:
    """The value that the pickle at raw[start:] describes, and where the pickle ends.

    Objects on the list are lists, dicts, tuples, sets, numbers, strings and bytes.

    Args:
        raw: the bytes.
        allowed: (module, name) -> constant or Constructor.
        persistent: gives the value of a reference that the file's format defines (a storage of torch.save).
        start: where the pickle begins.

    Raises:
        ForbiddenGlobal: the pickle names something that is not on the list.
        DamagedPickle: anything else does not fit.
    """
    machine = _Machine(raw, allowed, persistent, start)
    try:
        return machine.run(), machine.position
    except (ForbiddenGlobal, DamagedPickle):
        raise
    except (IndexError, KeyError, struct.error) as error:  # stack, memo or bytes used up
        raise DamagedPickle(
            f"the pickle is cut off or damaged at byte {machine.position} ({error})"
        ) from None
    except (
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # arguments that a constructor refuses
        raise DamagedPickle(f"{shown(error)} (byte {machine.position} of the pickle)") from None


def shown(value: object) -> str:
    """One short printable line of what a file says: text and errors as they are, anything else as `spelled`."""
    if isinstance(value, BaseException):
        value = str(value)
    return _one_line(value[: _MAX_SHOWN + 1]) if isinstance(value, str) else spelled(value)


def spelled(value: object) -> str:
    """One short printable line of a value as Python spells it. Takes no time, whatever the value holds."""
    return _one_line(_spelled(value, _MAX_SHOWN + 1))


def _one_line(text: str) -> str:
    text = printable(text).replace("\n", "\\n")
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _spelled(value: Any, limit: int) -> str:
    """The first `limit` characters of the value's spelling, or somewhat more."""
    if limit <= 0:
        return "…"
    if type(value) in (str, bytes):
        return repr(value[:limit])
    if type(value) is int and value.bit_length() > _MAX_SHOWN_BITS:
        return f"an integer of {value.bit_length()} bits"
    if type(value) not in _BRACKETS:
        return repr(value)[:limit]  # numbers, dtypes, and objects of ours that are short
    before, after = _BRACKETS[type(value)]
    text = before
    for item in value.items() if type(value) is dict else value:
        if len(text) >= limit:
            break
        text += "" if text == before else ", "
        if type(value) is dict:
            text += _spelled(item[0], limit - len(text)) + ": "
            item = item[1]
        text += _spelled(item, limit - len(text))
    return text + ("," if type(value) is tuple and len(value) == 1 else "") + after


class _Machine:
    """The stack machine. `position` is that of the next instruction's byte."""

    def __init__(
        self, raw: bytes, allowed: Allowed, persistent: Callable[[Any], Any] | None, start: int
    ) -> None:
        self.position = start
        self._raw, self._allowed, self._persistent = raw, allowed, persistent
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        self._num_objects = self._num_chosen_keys = 0

    def run(self) -> Any:
        while (opcode := self._take(1)[0]) != _STOP:
            instruction = _INSTRUCTIONS.get(opcode)
            if instruction is None:
                raise DamagedPickle(f"instruction {opcode:#04x} does not belong to plain data")
            instruction(self)
        return self._stack.pop()

    # ---- bytes ----------------------------------------------------------------------------------------------------

    def _take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._raw):
            raise DamagedPickle(f"the pickle is cut off: {len(self._raw)} bytes, at least {end} expected")
        found = self._raw[self.position : end]
        self.position = end
        return found

    def _number(self, num_bytes: int) -> int:
        return int.from_bytes(self._take(num_bytes), "little")

    def _line(self) -> str:
        end = self._raw.find(b"\n", self.position)
        if end < 0:
            raise DamagedPickle("a name in the pickle does not end")
        return self._take(end + 1 - self.position)[:-1].decode("utf-8", "replace")

    # ---- values ---------------------------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _count(self, number: int = 1) -> None:
        self._num_objects += number
        if self._num_objects > _MAX_OBJECTS:
            raise DamagedPickle(f"it has more than {_MAX_OBJECTS:,} objects")

    def _push_new(self, value: Any) -> None:
        self._count()
        self._stack.append(value)

    def _push_text(self, size_bytes: int) -> None:
        self._push_new(self._take(self._number(size_bytes)).decode("utf-8", "surrogatepass"))

    def _push_old_text(self, size_bytes: int) -> None:
        self._push_new(self._take(self._number(size_bytes)).decode("latin-1"))

    def _push_bytes(self, size_bytes: int) -> None:
        self._push_new(self._take(self._number(size_bytes)))

    def _push_long(self, size_bytes: int) -> None:
        size = self._number(size_bytes)
        if size > 64:
            raise DamagedPickle(f"an integer of {size} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _mark(self) -> None:
        self._count()
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._marked.pop()
        return found

    def _push_tuple(self, length: int) -> None:
        if length > len(self._stack):
            raise DamagedPickle("a tuple of more values than there are")
        values = tuple(self._stack[len(self._stack) - length :])
        del self._stack[len(self._stack) - length :]
        self._push_new(values)

    def _remember(self, key: int) -> None:
        self._count()
        self._memo[key] = self._stack[-1]

    # ---- containers -----------------------------------------------------------------------------------------------

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(values)
        elif type(target) is not Opaque:  # whose items are not needed
            raise DamagedPickle(f"items appended to {type(target).__name__}")

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if len(values) % 2:
            raise DamagedPickle("a key without a value")
        if type(target) is dict:
            target.update(zip(map(self._key, values[::2]), values[1::2], strict=True))
        elif type(target) is not Opaque:
            raise DamagedPickle(f"items set in {type(target).__name__}")

    def _add_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not set:
            raise DamagedPickle(f"items added to {type(target).__name__}")
        target.update(map(self._key, values))

    def _key(self, value: Any) -> Any:
        if type(value) in (tuple, float) or (type(value) is int and not -_SMALL < value < _SMALL):
            self._num_chosen_keys += 1
            if self._num_chosen_keys > _MAX_CHOSEN_KEYS:
                raise DamagedPickle(
                    f"more than {_MAX_CHOSEN_KEYS:,} keys that are neither text nor small numbers"
                )
        return _key(value)

    # ---- names ----------------------------------------------------------------------------------------------------

    def _push_global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise DamagedPickle("a name that is not text")
        if (module, name) not in self._allowed:
            raise ForbiddenGlobal(f"{shown(module)}.{shown(name)}")
        self._push(self._allowed[module, name])

    def _push_stacked_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_global(module, name)

    def _refuse_instance(self, module: str, name: str) -> None:
        raise ForbiddenGlobal(f"{shown(module)}.{shown(name)}")

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Constructor or type(arguments) is not tuple:
            raise DamagedPickle(f"a call of {type(function).__name__}, which is not a constructor")
        # What is called may copy its arguments, and what is in them.
        self._count(len(arguments) + sum(len(item) for item in arguments if type(item) in _BRACKETS))
        self._push_new(function.make(*arguments))

    def _set_state(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is Opaque:
            target.state = state
        elif type(target) is not dict:  # a state dict has attributes that carry no weights
            raise DamagedPickle(f"a state for {type(target).__name__}")

    def _push_reference(self) -> None:
        if self._persistent is None:
            raise DamagedPickle("a reference to data outside of the pickle")
        self._push_new(self._persistent(self._stack.pop()))


def _key(value: Any) -> Any:
    """A key whose hash takes no time: hashing deeply nested tuples could take forever."""
    if (
        type(value) is tuple
        and len(value) <= _MAX_KEY_ITEMS
        and all(type(item) in _SCALARS for item in value)
    ):
        return value
    if type(value) not in _SCALARS and type(value) is not Opaque:
        raise DamagedPickle(f"a key of type {type(value).__name__}")
    return value


_SCALARS = (str, int, bool, float, bytes, type(None))
_BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"), tuple: ("(", ")"), dict: ("{", "}"), set: ("{", "}"), frozenset: ("frozenset({", "})"),
}  # fmt: skip
_STOP = ord(".")
# What each instruction does, by its byte; the names are those of the module pickletools.
_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m._take(1),  # PROTO
    0x95: lambda m: m._take(8),  # FRAME: lengths for readers of streams
    ord("("): lambda m: m._mark(),  # MARK
    ord("0"): lambda m: m._stack.pop(),  # POP
    ord("1"): lambda m: m._since_mark(),  # POP_MARK
    ord("2"): lambda m: m._push(m._stack[-1]),  # DUP
    ord("N"): lambda m: m._push(None),  # NONE
    0x88: lambda m: m._push(True),  # NEWTRUE
    0x89: lambda m: m._push(False),  # NEWFALSE
    ord("J"): lambda m: m._push(struct.unpack("<i", m._take(4))[0]),  # BININT
    ord("K"): lambda m: m._push(m._number(1)),  # BININT1
    ord("M"): lambda m: m._push(m._number(2)),  # BININT2
    0x8A: lambda m: m._push_long(1),  # LONG1
    0x8B: lambda m: m._push_long(4),  # LONG4
    ord("G"): lambda m: m._push(struct.unpack(">d", m._take(8))[0]),  # BINFLOAT
    0x8C: lambda m: m._push_text(1),  # SHORT_BINUNICODE
    ord("X"): lambda m: m._push_text(4),  # BINUNICODE
    0x8D: lambda m: m._push_text(8),  # BINUNICODE8
    ord("U"): lambda m: m._push_old_text(1),  # SHORT_BINSTRING, of Python 2
    ord("T"): lambda m: m._push_old_text(4),  # BINSTRING, of Python 2
    ord("C"): lambda m: m._push_bytes(1),  # SHORT_BINBYTES
    ord("B"): lambda m: m._push_bytes(4),  # BINBYTES
    0x8E: lambda m: m._push_bytes(8),  # BINBYTES8
    0x96: lambda m: m._push_bytes(8),  # BYTEARRAY8
    ord("]"): lambda m: m._push_new([]),  # EMPTY_LIST
    ord("}"): lambda m: m._push_new({}),  # EMPTY_DICT
    0x8F: lambda m: m._push_new(set()),  # EMPTY_SET
    ord(")"): lambda m: m._push(()),  # EMPTY_TUPLE
    0x85: lambda m: m._push_tuple(1),  # TUPLE1
    0x86: lambda m: m._push_tuple(2),  # TUPLE2
    0x87: lambda m: m._push_tuple(3),  # TUPLE3
    ord("t"): lambda m: m._push_new(tuple(m._since_mark())),  # TUPLE
    ord("a"): lambda m: m._append([m._stack.pop()]),  # APPEND
    ord("e"): lambda m: m._append(m._since_mark()),  # APPENDS
    ord("s"): lambda m: m._set_items([m._stack.pop(-2), m._stack.pop()]),  # SETITEM
    ord("u"): lambda m: m._set_items(m._since_mark()),  # SETITEMS
    0x90: lambda m: m._add_items(m._since_mark()),  # ADDITEMS
    0x91: lambda m: m._push_new(frozenset(map(m._key, m._since_mark()))),  # FROZENSET
    ord("h"): lambda m: m._push(m._memo[m._number(1)]),  # BINGET
    ord("j"): lambda m: m._push(m._memo[m._number(4)]),  # LONG_BINGET
    ord("q"): lambda m: m._remember(m._number(1)),  # BINPUT
    ord("r"): lambda m: m._remember(m._number(4)),  # LONG_BINPUT
    0x94: lambda m: m._remember(len(m._memo)),  # MEMOIZE
    ord("c"): lambda m: m._push_global(m._line(), m._line()),  # GLOBAL
    0x93: lambda m: m._push_stacked_global(),  # STACK_GLOBAL
    ord("i"): lambda m: m._refuse_instance(m._line(), m._line()),  # INST, of protocol 0
    ord("R"): lambda m: m._call(),  # REDUCE
    0x81: lambda m: m._call(),  # NEWOBJ
    ord("b"): lambda m: m._set_state(),  # BUILD
    ord("Q"): lambda m: m._push_reference(),  # BINPERSID
}
