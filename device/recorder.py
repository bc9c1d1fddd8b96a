"""Register accesses of a live card, written down as they come: one line each, in the order of their answers.

    r2 common.num_queues = 3             2 bytes were read, and were 3
    w2 common.queue_select 1             2 bytes were written
    w4 common.queue_desc+4 0x1           the upper half of a register of 8 bytes
    r1 device+0x6 = 1                    device configuration
    w2 notify+0x1000 1                   a doorbell
    r1 isr = 0
    w2 lm+0x20 0xff                      the live-migration block, in BAR 4
    r4 bar0+0x6000 = 0                   whatever else a register BAR has
    # reset: ...                         what is no access of a driver

Registers have their names of virtio 1.3, 4.1.4.3. Numbers are as they are in registers, little-endian.

An access that was refused, or of another width than 1, 2, 4 or 8 bytes, stands in a comment. Configuration
space is left out: a hypervisor answers much of it itself, and asks for much that no driver wants. What comes
to registers by its window (virtio 1.3, 4.1.4.9) is there. On-card memory is left out too: it is no register
and may be mapped.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from device.card import NetworkCard
from device.errors import DeviceError
from device.function import Accesses, Data, ResetKind
from device.pci import Bar
from device.pci.capabilities import VirtioCapability, VirtioCfgType
from device.profiles import LIVE_MIGRATION_BAR, LIVE_MIGRATION_SIZE
from device.virtio.transport import COMMON_CONFIG

__all__ = ["RECORDING_LIMIT", "Recorder", "recording"]

log = logging.getLogger("trionic.record")

RECORDING_LIMIT: Final = 16 << 20
"""Bytes of a recording, half a million accesses. A driver starts with some two hundred, and then rings a
doorbell for a burst of frames; but a client may ask for as many as it likes, and must not fill the disk."""

_FULL: Final = "# full: what was done after this is not here"

_WIDTHS: Final = (1, 2, 4, 8)


class Recorder:
    """Gives each access to a register of `card` to `put`, as a line, when it is answered.

    After `limit` bytes, or should `put` raise OSError, the recording ends and the card lives on.

    From now on the card offers no eventfds for doorbells: they would be rung past the recorder, as those are
    that a client has already.
    """

    def __init__(
        self, card: NetworkCard, put: Callable[[bytes], object], *, limit: int = RECORDING_LIMIT
    ) -> None:
        self._put: Callable[[bytes], object] | None = put
        self._left = limit
        self._places = _places(card)
        function = card.function
        function.doorbells = {}
        self._on_reset = function.on_reset
        function.on_reset = self._reset
        self._write(f"# {card.profile.text}")
        for index, bar in function.bars.items():
            if isinstance(bar, Bar):
                function.interpose(index, partial(self._watch, index))

    def _watch(self, bar: int, accesses: Accesses) -> Accesses:
        def read(offset: int, count: int) -> bytes:
            try:
                data = accesses.read(offset, count)
            except DeviceError as error:
                self._write(f"# r{count} {self._place(bar, offset)}: {error}")
                raise
            self._tell("r", bar, offset, " =", data)
            return data

        def write(offset: int, data: Data) -> None:
            try:
                accesses.write(offset, data)
            except DeviceError as error:
                self._write(f"# w{len(data)} {self._place(bar, offset)}: {error}")
                raise
            self._tell("w", bar, offset, "", data)

        return Accesses(read, write)

    def _reset(self, kind: ResetKind) -> None:
        self._write(f"# reset: {kind.value}")
        self._on_reset(kind)

    def _tell(self, verb: str, bar: int, offset: int, sign: str, data: Data) -> None:
        step = f"{verb}{len(data)} {self._place(bar, offset)}"
        if len(data) in _WIDTHS:
            self._write(f"{step}{sign} {_number(int.from_bytes(data, 'little'))}")
        else:
            self._write(f"# {step}")

    def _place(self, bar: int, offset: int) -> str:
        for place in self._places:
            if place.bar == bar and place.start <= offset < place.end:
                return place.name(offset - place.start)
        return f"bar{bar}+{offset:#x}"

    def _write(self, line: str) -> None:
        if self._put is None:
            return
        self._left -= len(line) + 1
        full = self._left < len(_FULL) + 1
        try:
            self._put(f"{_FULL if full else line}\n".encode())
        except OSError as error:
            log.warning("the recording ends here: %s", error.strerror)
            self.close()
        if full:
            self.close()

    def close(self) -> None:
        """Record nothing more. Doing it twice does nothing."""
        self._put = None


@contextmanager
def recording(card: NetworkCard, file: Path) -> Iterator[None]:
    """Record `card` in `file`, which is made anew; OSError if it cannot be.

    Nobody waits for who reads it, should it be a pipe or a terminal.
    """
    with open(file, "wb", buffering=0, opener=_without_waiting) as out:

        def put(line: bytes) -> None:
            if out.write(line) != len(line):
                raise BlockingIOError(errno.EAGAIN, "its file takes no more for now")

        recorder = Recorder(card, put)
        try:
            yield
        finally:
            recorder.close()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


@dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of a BAR whose names are known."""

    bar: int
    start: int
    end: int
    name: Callable[[int], str]
    """Of the byte at an offset from `start`."""


def _places(card: NetworkCard) -> list[_Place]:
    places = [
        _Place(part.bar, part.structure_offset, part.structure_offset + part.length, _NAMES[part.cfg_type])
        for part in card.function.capabilities
        if isinstance(part, VirtioCapability)
    ]
    return [*places, _Place(LIVE_MIGRATION_BAR, 0, LIVE_MIGRATION_SIZE, partial(_plain, "lm"))]


def _plain(structure: str, offset: int) -> str:
    return f"{structure}+{offset:#x}"


def _common(offset: int) -> str:
    register = next(each for each in reversed(COMMON_CONFIG) if each.offset <= offset)
    more = offset - register.offset
    return f"common.{register.name}{f'+{more}' if more else ''}"


def _number(value: int) -> str:
    return str(value) if value < 10 else f"{value:#x}"


_NAMES: Final[Mapping[int, Callable[[int], str]]] = {
    VirtioCfgType.COMMON: _common,
    VirtioCfgType.NOTIFY: partial(_plain, "notify"),
    VirtioCfgType.ISR: lambda _offset: "isr",
    VirtioCfgType.DEVICE: partial(_plain, "device"),
}
