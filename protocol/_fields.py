"""The language in which messages are declared: a record is a frozen dataclass whose annotations are its
wire layout.

    @record(size=16)
    class RegionAccess(Record):
        offset: U64
        region: U32
        count: U32

Encoding, decoding, the layout table and the pretty-printer all come from those lines. Fields stand in wire
order without padding, in the byte order of the host (spec, "Protocol Specification"). A declared size that
the fields do not add up to is an error at import.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntFlag
from functools import cache
from operator import attrgetter
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Self,
    TypeVar,
    dataclass_transform,
    get_args,
    get_type_hints,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@dataclass(frozen=True, slots=True)
class Scalar:
    """One unsigned integer on the wire, or a fixed number of bytes: `code` is its letter in the struct
    module.
    """

    code: str


U8 = Annotated[int, Scalar("B")]
U16 = Annotated[int, Scalar("H")]
U32 = Annotated[int, Scalar("I")]
U64 = Annotated[int, Scalar("Q")]
Octets8 = Annotated[bytes, Scalar("8s")]


@dataclass(frozen=True, slots=True)
class Field:
    """Where one field of a record lies: bytes from the record's start, bytes long, and the flags it holds,
    if any.
    """

    name: str
    offset: int
    size: int
    flags: type[IntFlag] | None


class Record:
    """Base of all declared messages; see the module's text. Not to be made by itself."""

    __slots__ = ()

    size: ClassVar[int]
    """Bytes on the wire."""
    layout: ClassVar[tuple[Field, ...]]
    _struct: ClassVar[struct.Struct]
    _values: ClassVar[Any]
    _convert: ClassVar[tuple[tuple[int, type[IntFlag]], ...]]
    _octets: ClassVar[tuple[Field, ...]]

    def encode(self) -> bytes:
        """The record's bytes; raises ValueError if a value does not fit its field."""
        for field in self._octets:
            if len(getattr(self, field.name)) != field.size:
                raise ValueError(f"{self!r} does not have {field.size} bytes of {field.name}")
        try:
            return self._struct.pack(*self._values(self))
        except struct.error as error:
            raise ValueError(f"{self!r} does not fit its fields: {error}") from None

    @classmethod
    def decode(cls, buffer: ReadableBuffer, offset: int = 0) -> Self:
        """The record that lies `offset` bytes into the buffer; raises ValueError if the buffer ends before
        it does.
        """
        try:
            values: Any = cls._struct.unpack_from(buffer, offset)
        except struct.error:
            raise ValueError(f"{cls.__name__} needs {cls.size} bytes") from None
        if cls._convert:
            values = list(values)
            for position, flags in cls._convert:
                values[position] = _flags(flags, values[position])
        return cls(*values)

    def pretty(self) -> str:
        """One line: the name and every field, flags by name, 64-bit fields in hexadecimal."""
        return f"{type(self).__name__}({', '.join(self._pretty_fields())})"

    def _pretty_fields(self) -> list[str]:
        shown = []
        for field in self.layout:
            value = getattr(self, field.name)
            if field.flags is not None:
                text = _flags(field.flags, int(value)).name or hex(value)
            elif isinstance(value, bytes):
                text = value.hex()
            else:
                text = hex(value) if field.size == 8 else str(value)
            shown.append(f"{field.name}={text}")
        return shown


@cache
def _unnamed(kind: type[IntFlag]) -> int:
    """The bits that are no flag of `kind`."""
    return ~sum(int(flag) for flag in kind)


def _flags(kind: type[IntFlag], value: int) -> IntFlag:
    """`kind(value)`, and nothing is kept of it: an IntFlag remembers for ever each value that it was made
    from, and a peer can choose 2**32 of them.
    """
    if not value & _unnamed(kind):
        return kind(value)
    member = int.__new__(kind, value)
    member._value_ = value
    member._name_ = None
    return member


R = TypeVar("R", bound=Record)


@dataclass_transform(frozen_default=True)
def record(*, size: int) -> Callable[[type[R]], type[R]]:
    """Make a declared class a frozen, slotted dataclass with its wire layout; raises TypeError if the
    fields do not add up to `size`.
    """

    def declare(cls: type[R]) -> type[R]:
        made = dataclass(frozen=True, slots=True)(cls)
        hints = get_type_hints(made, include_extras=True)
        layout: list[Field] = []
        codes = "="
        for field in fields(made):  # type: ignore[arg-type]
            base, scalar = get_args(hints[field.name])
            width = struct.calcsize("=" + scalar.code)
            flags = base if issubclass(base, IntFlag) else None
            layout.append(Field(field.name, struct.calcsize(codes), width, flags))
            codes += scalar.code
        made._struct = struct.Struct(codes)
        made.size = made._struct.size
        made.layout = tuple(layout)
        made._octets = tuple(field for field in layout if get_args(hints[field.name])[0] is bytes)
        made._values = _getter(layout)
        made._convert = tuple((at, field.flags) for at, field in enumerate(layout) if field.flags is not None)
        if made.size != size:
            raise TypeError(f"{cls.__name__} is {made.size} bytes, declared as {size}")
        return made

    return declare


def _getter(layout: list[Field]) -> Any:
    """What gives a record's values in wire order; attrgetter gives a tuple for two names or more."""
    values = attrgetter(*(field.name for field in layout))
    return values if len(layout) > 1 else staticmethod(lambda record: (values(record),))


def layout_table(cls: type[Record]) -> str:
    """A record's layout as text, a line per field: offset, size, name."""
    return "\n".join(f"{field.offset:4} {field.size:2} {field.name}" for field in cls.layout)
