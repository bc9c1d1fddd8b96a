"""Registers as data.

A register is a class; its attributes are its fields, each a bit or a (most significant, least significant)
pair with what a write does to it: nothing (`ro`), store (`rw`), or clear the bits written as one (`w1c`).
Bits nobody declares read zero and ignore writes. A register file is a run of bytes with the masks of the
registers placed in it; every access goes by the masks alone, so any size and alignment behaves as the single
registers would.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar


class Access(Enum):
    """What a write does to a field."""

    RO = "ro"
    RW = "rw"
    W1C = "w1c"


@dataclass(frozen=True, slots=True)
class Field:
    """Bits `high` down to `low` of a register, both included."""

    high: int
    low: int
    access: Access
    reset: int = 0
    name: str = ""

    @property
    def mask(self) -> int:
        """The field's bits within the register."""
        return (1 << (self.high + 1)) - (1 << self.low)

    def get(self, value: int) -> int:
        """The field's value within the register value `value`."""
        return (value & self.mask) >> self.low

    def put(self, value: int, field: int) -> int:
        """The register value `value` with this field set to `field`; ValueError if it does not fit."""
        if field << self.low & ~self.mask:
            raise ValueError(
                f"{field:#x} does not fit into the {self.high - self.low + 1} bits of {self.name}"
            )
        return value & ~self.mask | field << self.low


def ro(high: int, low: int | None = None, *, reset: int = 0) -> Field:
    """A field that only the device changes."""
    return Field(high, high if low is None else low, Access.RO, reset)


def rw(high: int, low: int | None = None, *, reset: int = 0) -> Field:
    """A field that takes what is written."""
    return Field(high, high if low is None else low, Access.RW, reset)


def w1c(high: int, low: int | None = None, *, reset: int = 0) -> Field:
    """A field whose bits are cleared by writing them as one."""
    return Field(high, high if low is None else low, Access.W1C, reset)


class Register:
    """The base of register declarations: `class Command(Register, width=16): MEMORY = rw(1)`.

    The declaration is checked when the class is made: TypeError for fields that overlap or leave the width.
    """

    WIDTH: ClassVar[int] = 0  # bits, a multiple of 8
    SIZE: ClassVar[int] = 0  # bytes
    FIELDS: ClassVar[tuple[Field, ...]] = ()  # least significant first
    WRITABLE: ClassVar[int] = 0
    WRITE_ONE_CLEAR: ClassVar[int] = 0
    RESET: ClassVar[int] = 0

    def __init_subclass__(cls, *, width: int) -> None:
        if width % 8 or width <= 0:
            raise TypeError(f"{cls.__name__}: a register is whole bytes, not {width} bits")
        fields = []
        taken = 0
        for name, declared in vars(cls).copy().items():
            if not isinstance(declared, Field):
                continue
            if name in vars(Register):
                raise TypeError(
                    f"{cls.__name__}.{name}: no field can have the name of a register's own attribute"
                )
            field = replace(declared, name=name)
            setattr(cls, name, field)
            if not width > field.high >= field.low >= 0 or field.mask & taken:
                raise TypeError(
                    f"{cls.__name__}.{name}: bits {field.high}..{field.low} overlap or leave {width} bits"
                )
            taken |= field.mask
            fields.append(field)
        cls.WIDTH, cls.SIZE = width, width // 8
        cls.FIELDS = tuple(sorted(fields, key=lambda field: field.low))
        cls.WRITABLE = sum(field.mask for field in fields if field.access is Access.RW)
        cls.WRITE_ONE_CLEAR = sum(field.mask for field in fields if field.access is Access.W1C)
        cls.RESET = 0
        for field in fields:
            cls.RESET = field.put(cls.RESET, field.reset)

    @classmethod
    def build(cls, **fields: int) -> int:
        """The reset value with the named fields set otherwise; AttributeError for an unknown name."""
        value = cls.RESET
        for name, field in fields.items():
            declared: Field = getattr(cls, name)
            value = declared.put(value, field)
        return value

    @classmethod
    def describe(cls, value: int) -> str:
        """`value` in hex with its non-zero fields by name; bits of no field as `reserved`."""
        parts = [
            f"{field.name}={field.get(value):#x}" if field.high > field.low else field.name
            for field in cls.FIELDS
            if field.get(value)
        ]
        stray = value & ~sum(field.mask for field in cls.FIELDS)
        if stray:
            parts.append(f"reserved={stray:#x}")
        return f"{value:#0{cls.SIZE * 2 + 2}x}" + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True, slots=True)
class At:
    """A register's place in a structure: byte offset, the name of the specification, the declaration."""

    offset: int
    name: str
    register: type[Register]


class Byte(Register, width=8):
    """Eight bits, read only."""

    VALUE = ro(7, 0)


class Word(Register, width=16):
    """Sixteen bits, read only."""

    VALUE = ro(15, 0)


class Dword(Register, width=32):
    """Thirty-two bits, read only."""

    VALUE = ro(31, 0)


class ScratchByte(Register, width=8):
    """Eight bits for software's own use."""

    VALUE = rw(7, 0)


class ScratchWord(Register, width=16):
    """Sixteen bits for software's own use."""

    VALUE = rw(15, 0)


class ScratchDword(Register, width=32):
    """Thirty-two bits for software's own use."""

    VALUE = rw(31, 0)
