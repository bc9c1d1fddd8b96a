"""A thread that touches a BAR's mapping as fast as it can, most of the time without the interpreter's lock.

What it writes says when that was: labels of times when the device answered, and of times when it did not.
The former may reach the device; the latter never may. In the middle of an access the memory may come or go
at any moment. Only a label that is new waits until the thread knows.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from client.mapping import BarMapping, MappingError

PAGE: Final = 4096
ONES: Final = (1 << 64) - 1
_MAGIC: Final = 0x7E57_ED00 << 32
_ANSWERED: Final = 1

SWITCH_S: Final = 1e-5
"""How long a thread keeps the interpreter's lock that others want: they meet at as many places as can be."""


def label(number: int, *, answered: bool) -> int:
    """What is written at a time, eight bytes."""
    return _MAGIC | number << 1 | (_ANSWERED if answered else 0)


def reached(data: bytes | memoryview) -> Iterator[int]:
    """What is in memory, each number once, but for zero."""
    yield from set(struct.unpack(f"<{len(data) // 8}Q", data)) - {0}


def check_reached(data: bytes | memoryview, number: int) -> None:
    """Only what was written when the device answered, up to that time, is in its memory."""
    for found in reached(data):
        assert found & ~0xFFFF_FFFF == _MAGIC, f"{found:#x} was written by nobody"
        assert found & _ANSWERED, f"{found:#x} was written while nobody answered"
        assert found <= label(number, answered=True), f"{found:#x} is from the future"


class Toucher:
    """Touches pages from `offset` of `mapping`, which must be writable."""

    def __init__(self, mapping: BarMapping, offset: int, pages: int) -> None:
        self.touched = 0
        """How often all of it was."""
        self.ones = 0
        """How often nobody answered."""
        self.failures: list[BaseException] = []
        self._mapping = mapping
        self._offset, self._pages = offset, pages
        self._label = label(0, answered=True)
        self._between = threading.Lock()
        self._turn = threading.Event()
        self._turn.set()
        self._passed = threading.Event()
        self._stopping = self._ended = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is touched meanwhile."""
        self._turn.clear()
        try:
            with self._between:
                yield
        finally:
            self._turn.set()

    def wait_touched(self) -> None:
        """Until all of it was touched once more, from the beginning on; for another thread."""
        for _ in range(2):
            self._passed.clear()
            if not self._ended:
                self._passed.wait()

    def set_label(self, number: int, *, answered: bool) -> None:
        """What is written from now on; the thread is paused."""
        self._label = label(number, answered=answered)

    @contextmanager
    def touching(self) -> Iterator[None]:
        """In a thread, which must not fail."""
        thread = threading.Thread(target=self._run, name="toucher")
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        thread.start()
        try:
            yield
        finally:
            self._stopping = True
            thread.join()
            sys.setswitchinterval(interval)
        for failure in self.failures:
            raise failure

    def _run(self) -> None:
        try:
            with self._mapping.view(self._offset, self._pages * PAGE) as view:
                memory = ctypes.c_char.from_buffer(view)
                address = ctypes.addressof(memory)
                while not self._stopping:
                    with self._between:
                        self._touch(view, address)
                    self.touched += 1
                    self._passed.set()
                    self._turn.wait()
                del memory
        except BaseException as failure:
            self.failures.append(failure)
        finally:
            self._ended = True
            self._passed.set()

    def _touch(self, view: memoryview, address: int) -> None:
        now = self._label
        page = struct.pack("<Q", now) * (PAGE // 8)
        for number in range(self._pages):
            ctypes.memmove(address + number * PAGE, page, PAGE)
        zlib.crc32(view)
        self._check(struct.unpack(f"<{len(view) // 8}Q", view), now)
        for at in range(self._offset, self._offset + self._pages * PAGE, PAGE):
            with suppress(MappingError):  # it cannot be faulted in now
                self._mapping.write(at, 8, now)
                self._check([self._mapping.read(at, 8)], now)

    def _check(self, found: Iterable[int], now: int) -> None:
        """Ours, or nobody's; a moment ago perhaps, for the memory may have come back since."""
        for number in set(found):
            if number == ONES:
                self.ones += 1
            elif number:
                assert number & ~0xFFFF_FFFF == _MAGIC, f"{number:#x} was written by nobody"
                assert number <= now | _ANSWERED, f"{number:#x} is from the future"
