"""Reads a pickle without running it.

Unpickling runs what the file says, so it is never done: the opcodes are interpreted here one by one, by a stack machine
that builds strings, numbers, bytes, tuples, lists, sets and dicts, and calls the few functions that it is given. Every
other name, and whatever the pickle makes of it, becomes a `Stranger`, which does nothing: training scripts store paths,
random states, configs and classes of their own beside the tensors, and these need not be read.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO


class Global(str):
    """A name that the pickle refers to; it stays a name."""


class Stranger:
    """What a pickle makes of a name that is not known. It does nothing but keep what the pickle gives it.

    Attributes:
        name: that is not known.
        arguments: that it was called with.
        state: the attributes that an instance of a class was given, as the pickle has them; None where it has none.
        items: of an instance that is a dict of its own kind.
    """

    def __init__(self, name: str, arguments: Sequence[Any] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.items: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"an object of {self.name}"


class _Mark:
    """Where a run of stack items begins."""


_MARK = _Mark()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "INT", "LONG", "FLOAT",
    "UNICODE", "STRING",
}  # fmt: skip
_EMPTY: dict[str, Callable] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}


def read_pickle(
    stream: BinaryIO,
    known: Mapping[str, Callable[..., Any]],
    types: Iterable[str] = (),
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Reads one pickle from `stream`, up to its STOP.

    Args:
        stream: opened for reading bytes; `read(n)` must not take more memory than there are bytes left.
        known: functions by the names that call them in the pickle.
        types: names that may be passed to these functions, as a `Global`.
        persistent_load: what a persistent id stands for.

    Raises:
        ValueError: an opcode that is not read, or one that finds other things on the stack than it needs.
        IndexError, KeyError, TypeError, StopIteration, OverflowError: likewise.
    """
    machine = _Machine(known, {*known, *types}, persistent_load)
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.run(opcode.name, argument)
    raise ValueError("a pickle without an end.")


class _Machine:
    """The stack and the memory of one pickle."""

    def __init__(self, known: Mapping[str, Callable], names: set[str], persistent_load: Callable | None) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._known, self._names, self._persistent_load = known, names, persistent_load

    def run(self, name: str, argument: Any) -> None:
        """Runs one opcode."""
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            stack.append({"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[name](self._to_mark()))
        elif name == "DICT":
            items = self._to_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS"):
            self._put(name)
        elif name in ("GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            self._global(name, argument)
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"):
            self._call(name, argument)
        elif name == "BUILD":  # attributes: of a module's state dict, a Namespace or a class that is not known
            state = stack.pop()
            if isinstance(stack[-1], Stranger):
                stack[-1].state = state
        elif name in ("BINPERSID", "PERSID") and self._persistent_load is not None:
            stack.append(self._persistent_load(stack.pop() if name == "BINPERSID" else argument))
        else:
            raise ValueError(f"the pickle opcode {name} is not read.")

    def _to_mark(self) -> list[Any]:
        """Takes the items above the last mark, and the mark, off the stack."""
        index = next(i for i in reversed(range(len(self.stack))) if self.stack[i] is _MARK)
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def _put(self, name: str) -> None:
        """Puts items into the container below them."""
        if name in ("APPENDS", "ADDITEMS", "SETITEMS"):
            items = self._to_mark()
        else:
            items = [self.stack.pop() for _ in range({"APPEND": 1, "SETITEM": 2}[name])][::-1]
        target = self.stack[-1]
        if isinstance(target, Stranger):
            target = target.items if name.startswith("SETITEM") else [] if name.startswith("APPEND") else set()
        if name.startswith("SETITEM"):
            _expect(target, dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "ADDITEMS":
            _expect(target, set).update(items)
        else:
            _expect(target, list).extend(items)

    def _global(self, name: str, argument: Any) -> None:
        """Puts a name on the stack: itself where it is known, a stranger otherwise."""
        if name == "GLOBAL":
            path = argument.replace(" ", ".")
        elif name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            path = f"{_expect(module, str)}.{_expect(attribute, str)}"
        else:
            path = f"extension {argument}"
        self.stack.append(Global(path) if path in self._names else Stranger(path))

    def _call(self, name: str, argument: Any) -> None:
        """Calls a known function; anything that is not known makes a stranger."""
        if name == "INST":
            function, arguments = Stranger(argument.replace(" ", ".")), self._to_mark()
        elif name == "OBJ":
            function, *arguments = self._to_mark()
        else:
            keywords = self.stack.pop() if name == "NEWOBJ_EX" else {}
            arguments, function = self.stack.pop(), self.stack.pop()
            if keywords:  # which no known function takes
                function = Stranger(getattr(function, "name", str(function)))
        if isinstance(function, Stranger):
            self.stack.append(Stranger(function.name, arguments if isinstance(arguments, tuple | list) else ()))
            return
        if _expect(function, Global) not in self._known:
            raise ValueError(f"a pickle that calls {function}.")
        self.stack.append(self._known[function](*_expect(arguments, tuple | list)))


class BoundedFile:
    """A file, read from its beginning, whose `read` takes no more memory than it has bytes left.

    (A buffered file makes room for as many bytes as it is asked for, and a pickle asks for what its lengths say.)

    Attributes:
        size: in bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        """Returns up to `size` bytes."""
        left = max(self.size - self._file.tell(), 0)
        return self._file.read(left if size < 0 else min(size, left))

    def readline(self) -> bytes:
        """Returns a line."""
        return self._file.readline()

    def tell(self) -> int:
        """Returns the place in the file."""
        return self._file.tell()


def _expect(value: Any, kind: Any) -> Any:
    """Returns `value` if it is a `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"a pickle that treats {type(value).__name__} as {getattr(kind, '__name__', kind)}.")
    return value
