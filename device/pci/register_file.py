"""A run of bytes that behaves as the registers placed in it."""

import errno
from collections.abc import Callable

from device.errors import DeviceError
from device.pci.registers import Register

Before = Callable[[], None]
After = Callable[[int, int], None]


class RegisterFile:
    """`size` bytes, little-endian, all reserved (zero, read only) until registers are placed.

    Hooks see registers, not accesses: a read that touches any byte of a watched register first runs its
    `before` hook, a write that touches any byte runs its `after` hook with the register's old and new value,
    changed or not.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._values = bytearray(size)
        self._view = memoryview(self._values)
        self._resets = bytearray(size)
        self._writable = bytearray(size)
        self._clears = bytearray(size)
        self._placed = bytearray(size)
        self._before: list[tuple[int, int, Before]] = []
        self._after: list[tuple[int, int, After]] = []
        self._live: set[int] = set()  # dwords with a `before` hook

    # --- declaration

    def place(
        self, offset: int, register: type[Register], *, reset: int | None = None, writable: int | None = None
    ) -> None:
        """Put `register` at byte `offset`.

        `reset` and `writable` replace the declaration's where an instance differs.

        ValueError if it lies outside the file or over another register.
        """
        end = offset + register.SIZE
        if offset < 0 or end > self.size:
            raise ValueError(f"{register.__name__} at {offset:#x} lies outside {self.size:#x} bytes")
        if any(self._placed[offset:end]):
            raise ValueError(f"{register.__name__} at {offset:#x} overlaps another register")
        self._placed[offset:end] = b"\1" * register.SIZE
        value = register.RESET if reset is None else reset
        mask = register.WRITABLE if writable is None else writable
        self._values[offset:end] = self._resets[offset:end] = value.to_bytes(register.SIZE, "little")
        self._writable[offset:end] = mask.to_bytes(register.SIZE, "little")
        self._clears[offset:end] = register.WRITE_ONE_CLEAR.to_bytes(register.SIZE, "little")

    def before_read(self, offset: int, size: int, hook: Before) -> None:
        """Run `hook` before any read of these bytes, so that it can `store` what they should show."""
        self._before.append((offset, offset + size, hook))
        self._live.update(range(offset >> 2, (offset + size + 3) >> 2))

    def after_write(self, offset: int, size: int, hook: After) -> None:
        """Run `hook(old, new)` after any write to these bytes.

        Hooks of one write run in the order of registration.
        """
        self._after.append((offset, offset + size, hook))

    # --- the device's side: no masks, no hooks

    def load(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset`."""
        return int.from_bytes(self._view[offset : offset + size], "little")

    def store(self, offset: int, size: int, value: int) -> None:
        """Set `size` bytes at `offset`."""
        self._values[offset : offset + size] = value.to_bytes(size, "little")

    def reset(self) -> None:
        """Every register to its reset value; runs no hooks."""
        self._values[:] = self._resets

    def declared(self) -> bytes:
        """Equal for two files exactly if the same registers with the same reset values are in them."""
        return bytes(self._resets + self._writable + self._clears + self._placed)

    def save(self) -> bytes:
        """What software can set, as it is, without the zeros at the end."""
        mask = int.from_bytes(self._writable, "little") | int.from_bytes(self._clears, "little")
        kept = int.from_bytes(self._values, "little") & mask
        return kept.to_bytes(self.size, "little").rstrip(b"\0")

    def stage(self, data: bytes) -> Callable[[], None]:
        """What makes the registers show `data`, which others like them saved; ValueError if it cannot be.

        Runs no hooks.
        """
        mask = int.from_bytes(self._writable, "little") | int.from_bytes(self._clears, "little")
        saved = int.from_bytes(data, "little")
        if len(data) > self.size or saved & ~mask:
            raise ValueError("bits that software cannot set")

        def apply() -> None:
            fixed = int.from_bytes(self._resets, "little") & ~mask
            self._values[:] = (fixed | saved).to_bytes(self.size, "little")

        return apply

    # --- the bus's side

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes; DeviceError(EINVAL) outside the file."""
        end = offset + count
        if offset < 0 or count < 0 or end > self.size:
            raise self._outside(offset, count)
        if count > 4 or offset >> 2 in self._live or (end - 1) >> 2 in self._live:
            for first, last, hook in self._before:
                if first < end and offset < last:
                    hook()
        return self._view[offset:end].tobytes()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` as the masks allow; DeviceError(EINVAL) outside the file."""
        count = len(data)
        end = offset + count
        if offset < 0 or end > self.size:
            raise self._outside(offset, count)
        touched = [
            (first, last - first, hook, self.load(first, last - first))
            for first, last, hook in self._after
            if first < end and offset < last
        ]
        written = int.from_bytes(data, "little")
        old = int.from_bytes(self._view[offset:end], "little")
        writable = int.from_bytes(self._writable[offset:end], "little")
        clears = int.from_bytes(self._clears[offset:end], "little")
        new = (old & ~writable | written & writable) & ~(written & clears)
        self._values[offset:end] = new.to_bytes(count, "little")
        for first, size, after, before in touched:
            after(before, self.load(first, size))

    def _outside(self, offset: int, count: int) -> DeviceError:
        return DeviceError(errno.EINVAL, f"{count} bytes at {offset:#x} lie outside {self.size:#x} bytes")
