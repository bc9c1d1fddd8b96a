"""Registers that are declared once, as data, and do what methods of their names say.

Accesses of the declared width are dispatched directly; any other width is put together from the declared
ones, so no access that stays inside the structure can fail.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True, slots=True)
class Register:
    """One register: its offset and width in bytes. One of several alike has its `index` among them."""

    name: str
    offset: int
    width: int
    writable: bool = True
    index: int | None = None


class DeclaredRegisters:
    """What is read and written of `registers`, as a handler of a BAR's sub-range.

    For each there is a method `_get_` and its name, and for each that is writable one `_set_` and its name,
    which takes a value below 1 << 8 * width. One with an index is given that first. Bytes that nobody
    declares read zero and take nothing. They are methods of `owner`, or else of a subclass.

    ValueError for registers one over another.
    """

    def __init__(self, registers: Iterable[Register], owner: object | None = None) -> None:
        self._owner = self if owner is None else owner
        self._readers: dict[tuple[int, int], Callable[[], int]] = {}
        self._writers: dict[tuple[int, int], Callable[[int], None]] = {}
        self._at: dict[int, Register] = {}
        for register in registers:
            key = register.offset, register.width
            self._readers[key] = self._method("get", register)
            if register.writable:
                self._writers[key] = self._method("set", register)
            for offset in range(register.offset, register.offset + register.width):
                if offset in self._at:
                    raise ValueError(f"{register.name} at {offset:#x} overlaps {self._at[offset].name}")
                self._at[offset] = register

    def _method(self, what: str, register: Register) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._owner, f"_{what}_{register.name}")
        return method if register.index is None else partial(method, register.index)

    def read(self, offset: int, count: int) -> int:
        """Read `count` bytes as a little-endian number."""
        reader = self._readers.get((offset, count))
        if reader is not None:
            return reader()
        value = 0
        for i in range(count):
            register = self._at.get(offset + i)
            if register is not None:
                whole = self._readers[register.offset, register.width]()
                value |= (whole >> 8 * (offset + i - register.offset) & 0xFF) << 8 * i
        return value

    def write(self, offset: int, count: int, value: int) -> None:
        """Write `count` bytes, the lowest first; a register that is touched in part keeps its other bytes."""
        writer = self._writers.get((offset, count))
        if writer is not None:
            writer(value)
            return
        done = 0
        while done < count:
            register = self._at.get(offset + done)
            if register is None:
                done += 1
                continue
            first = offset + done - register.offset
            part = min(register.width - first, count - done)
            mask = (1 << 8 * part) - 1
            if register.writable:
                key = register.offset, register.width
                kept = self._readers[key]() & ~(mask << 8 * first)
                self._writers[key](kept | (value >> 8 * done & mask) << 8 * first)
            done += part
