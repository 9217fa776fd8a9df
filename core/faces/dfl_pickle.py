"""Plain values out of a pickle, which is read as data and never run.

A pickle is a program that builds its values on a stack. This reader knows the few opcodes of
dictionaries, lists, numbers, text and bytes; what stands for a class or a function is a `Reference`
that holds a name and does nothing. NumPy's arrays and numbers, and the enumerations of DeepFaceLab,
are made from what the file says of them; any other name refuses the file.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..system.printable import plural
from .png import FaceFileError

MAX_OPCODES = 8_000_000
"""Opcodes that are read. 8 million make at most some 600 MB of values; a face takes a thousand."""

# What is encoded is no longer than its text: more is the same text again and again.
MAX_GROWTH = 4
MAX_NAME_LENGTH = 128
# 0 and 1 have no opcode in front by which they could be known.
PROTOCOLS = range(2, 6)

_DTYPES = {"f4", "f8", "i4", "i8", "u1", "b1"}
_ORDERS = ("<", "|", "=")
# NumPy 2 has renamed the module.
_MODULES = tuple(f"numpy.{core}" for core in ("core", "_core"))
_ROLES = {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    **{f"{module}.bytes": "no bytes" for module in ("__builtin__", "builtins")},
    **{f"{module}.multiarray._reconstruct": "empty array" for module in _MODULES},
    **{f"{module}.multiarray.scalar": "scalar" for module in _MODULES},
    **{f"{module}.numeric._frombuffer": "array" for module in _MODULES},
}
_ENUMERATIONS = ("samplelib", "facelib", "core.imagelib")
_MALFORMED = (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error)
"""What comes of a program that takes what is not there, or is of another type."""

_REMEDY = "extract the face again"


@dataclass(frozen=True)
class Reference:
    """The name of a class or function, and the part it plays; nothing is imported."""

    name: str
    role: str


@dataclass
class ElementType:
    """What an array says of its elements: code of the type, and order of its bytes."""

    code: str
    order: str = "<"
    is_plain: bool = True


@dataclass
class StoredArray:
    """An array as it is written; `values` makes it one."""

    shape: Any = None
    element: Any = None
    is_fortran: Any = False
    content: Any = None

    def values(self) -> np.ndarray:
        """The array. Raises FaceFileError where shape, type and bytes do not fit each other."""
        dtype = _dtype_of(self.element)
        is_shape = (
            isinstance(self.shape, tuple)
            and 0 < len(self.shape) <= 4
            and all(type(edge) is int and edge >= 0 for edge in self.shape)
        )
        if not is_shape or not isinstance(self.content, bytes):
            _refuse("has an array without shape or content")
        # Python's whole numbers do not overflow, so that no shape can pass by wrapping round.
        if math.prod(self.shape) * dtype.itemsize != len(self.content):
            num_bytes = len(self.content)
            unit = plural(num_bytes, "byte")
            _refuse(f"has an array of {self.shape} that holds {num_bytes} {unit}")
        order: Any = "F" if self.is_fortran is True else "C"
        # A view of the bytes: nothing is taken that the file does not hold.
        return np.frombuffer(self.content, dtype).reshape(self.shape, order=order)


def read_values(data: bytes) -> Any:
    """The value that a pickle makes.

    Arrays come as `StoredArray`, numbers of NumPy and enumerations as plain numbers.
    Raises FaceFileError, which names what the file refers to where that is not to be run.
    """
    try:
        return _Reader(data).read()
    except FaceFileError:
        raise
    except _MALFORMED:
        _refuse("is damaged")


def is_pickle(data: bytes) -> bool:
    """Whether it begins and ends as a pickle of a known protocol does."""
    return len(data) > 2 and data[0] == 0x80 and data[1] in PROTOCOLS and data[-1:] == b"."


class _Reader:
    """One pickle being read: its bytes, the stack, the marks in it and what is remembered."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._encoded_bytes = 0

    def read(self) -> Any:
        # Counted, though no opcode jumps back: each may add to what is held.
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)
            if opcode == b".":
                return self.pop()
            step = _STEPS.get(opcode)
            if step is None:
                _refuse(f"holds the opcode 0x{opcode.hex()}, which plain data have no use for")
            step(self)
        _refuse(f"has more than {MAX_OPCODES} opcodes")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self._position + count
        if end > len(self._data):
            _refuse("ends early")
        part = self._data[self._position : end]
        self._position = end
        return part

    def number(self, layout: str) -> Any:
        """The next number of that layout, as `struct` names it."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """The text up to the next line end."""
        end = self._data.index(b"\n", self._position)
        text = self.take(end - self._position).decode("ascii")
        self._position += 1
        return text

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def mark(self) -> None:
        self._below_marks.append(self._stack)
        self._stack = []

    def pop_to_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        values, self._stack = self._stack, self._below_marks.pop()
        return values

    def remember(self, index: int | None = None) -> None:
        # From protocol 4 on values are numbered in the order in which they are remembered.
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def push_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        # By class: what else has `extend` is not ours to call.
        if not isinstance(target, list):
            _refuse("appends to what is no list")
        target.extend(values)

    def set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            _refuse("sets entries of what is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):  # to hash a nested tuple could exhaust C's stack
                _refuse("has a dictionary with keys that are neither text nor numbers")
            target[key] = value

    def refer(self, module: Any, name: Any) -> None:
        """Push what stands for a class or function, if it is a known one."""
        if not isinstance(module, str) or not isinstance(name, str):
            _refuse("refers to what is no name")
        full = f"{module}.{name}"
        is_enumeration = any(
            module == known or module.startswith(f"{known}.") for known in _ENUMERATIONS
        )
        # By the whole name, but for enumerations, of which only the number is taken.
        role = _ROLES.get(full, "enumeration" if is_enumeration else "")
        if not role:
            shown = full if len(full) <= MAX_NAME_LENGTH else f"{full[:MAX_NAME_LENGTH]}..."
            raise FaceFileError(
                f"its metadata would run {shown!r}, which no face needs: the file is not to be "
                "trusted, remove it"
            )
        self.push(Reference(full, role))

    def call(self) -> None:
        """Push what a reference makes of its arguments."""
        arguments, target = self.pop(), self.pop()
        if not isinstance(target, Reference) or not isinstance(arguments, tuple):
            _refuse("calls what is no function")
        # One of our own functions, chosen by the role; the name of the file is never called.
        made = _MAKERS[target.role](*arguments)
        self._encoded_bytes += len(made) if isinstance(made, bytes) else 0
        if self._encoded_bytes > MAX_GROWTH * len(self._data):
            _refuse("encodes the same text again and again")
        self.push(made)

    def build(self) -> None:
        """Set the state of an array or of its type."""
        state, target = self.pop(), self._stack[-1]
        if isinstance(target, StoredArray):
            _, target.shape, target.element, target.is_fortran, target.content = state
        elif isinstance(target, ElementType):
            target.order = state[1]
            target.is_plain = all(part is None for part in state[2:5])
        else:
            _refuse("sets the state of what is no array")


def _dtype_of(element: Any) -> np.dtype:
    is_known = (
        isinstance(element, ElementType)
        and element.is_plain
        and element.code in _DTYPES
        and element.order in _ORDERS
    )
    if not is_known:
        _refuse(f"has an array whose elements are none of {', '.join(sorted(_DTYPES))}")
    # "|" has no order, and "=" is this one on the machines that DeepFaceLab runs on.
    return np.dtype(f"<{element.code}")


def _element_type(code: Any, *_: Any) -> ElementType:
    if not isinstance(code, str):
        _refuse("has an array whose type is no text")
    order, code = (code[0], code[1:]) if code[:1] in ("<", ">", "|", "=") else ("<", code)
    return ElementType(code, order)


def _encoded(text: Any, encoding: Any) -> bytes:
    # Python writes bytes so in protocol 2: as text with a character for each.
    if not isinstance(text, str) or encoding != "latin1":
        _refuse("encodes what is no text")
    return text.encode("latin-1")


def _scalar(element: Any, content: Any) -> Any:
    return StoredArray((1,), element, False, content).values()[0].item()


def _from_buffer(content: Any, element: Any, shape: Any, order: Any) -> StoredArray:
    return StoredArray(shape, element, order == "F", content)


def _enumeration(value: Any) -> int:
    if type(value) is not int:
        _refuse("has an enumeration that is no number")
    return value


def _not_callable(*_: Any) -> NoReturn:
    _refuse("makes an array in a way that NumPy does not")


_MAKERS: dict[str, Callable[..., Any]] = {
    # Only ever an argument, as is: NumPy reconstructs by another function.
    "ndarray": _not_callable,
    "dtype": _element_type,
    "encode": _encoded,
    "no bytes": lambda: b"",  # as protocol 2 writes them
    "empty array": lambda *_: StoredArray(),
    "scalar": _scalar,
    "array": _from_buffer,
    "enumeration": _enumeration,
}


def _protocol(reader: _Reader) -> None:
    if reader.number("B") not in PROTOCOLS:
        _refuse("is of an unknown protocol")


def _frame(reader: _Reader) -> None:
    reader.take(8)  # its size, which the file's own end makes needless


def _text(layout: str) -> Callable[[_Reader], None]:
    """A step that pushes text whose length has that layout."""
    return lambda reader: reader.push(
        reader.take(reader.number(layout)).decode("utf-8", "surrogatepass")
    )


def _bytes(layout: str) -> Callable[[_Reader], None]:
    """A step that pushes bytes whose number has that layout."""
    return lambda reader: reader.push(reader.take(reader.number(layout)))


def _number(layout: str) -> Callable[[_Reader], None]:
    """A step that pushes a number of that layout."""
    return lambda reader: reader.push(reader.number(layout))


def _constant(make: Callable[[], Any]) -> Callable[[_Reader], None]:
    """A step that pushes a new value."""
    return lambda reader: reader.push(make())


def _stack_reference(reader: _Reader) -> None:
    # Protocol 4 has both on the stack, the name on top.
    name, module = reader.pop(), reader.pop()
    reader.refer(module, name)


def _set_item(reader: _Reader) -> None:
    value, key = reader.pop(), reader.pop()
    reader.set_items([key, value])


_STEPS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _Reader.mark,
    b"}": _constant(dict),
    b"]": _constant(list),
    b")": _constant(tuple),
    b"t": lambda reader: reader.push(tuple(reader.pop_to_mark())),
    b"\x85": lambda reader: reader.push_tuple(1),
    b"\x86": lambda reader: reader.push_tuple(2),
    b"\x87": lambda reader: reader.push_tuple(3),
    b"a": lambda reader: reader.extend([reader.pop()]),
    b"e": lambda reader: reader.extend(reader.pop_to_mark()),
    b"s": _set_item,
    b"u": lambda reader: reader.set_items(reader.pop_to_mark()),
    b"N": _constant(lambda: None),
    b"\x88": _constant(lambda: True),
    b"\x89": _constant(lambda: False),
    b"J": _number("<i"),
    b"K": _number("B"),
    b"M": _number("<H"),
    b"\x8a": lambda reader: reader.push(
        int.from_bytes(reader.take(reader.number("B")), "little", signed=True)
    ),
    b"G": _number(">d"),
    b"X": _text("<I"),
    b"\x8c": _text("B"),
    b"\x8d": _text("<Q"),
    b"B": _bytes("<I"),
    b"C": _bytes("B"),
    b"\x8e": _bytes("<Q"),
    b"\x96": _bytes("<Q"),
    b"q": lambda reader: reader.remember(reader.number("B")),
    b"r": lambda reader: reader.remember(reader.number("<I")),
    b"\x94": _Reader.remember,
    b"h": lambda reader: reader.recall(reader.number("B")),
    b"j": lambda reader: reader.recall(reader.number("<I")),
    b"c": lambda reader: reader.refer(reader.line(), reader.line()),
    b"\x93": _stack_reference,
    b"R": _Reader.call,
    b"\x81": _Reader.call,
    b"b": _Reader.build,
}


def _refuse(what: str) -> NoReturn:
    raise FaceFileError(f"its metadata {what}: {_REMEDY}")
