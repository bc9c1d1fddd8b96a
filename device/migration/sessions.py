"""The two ends of a data transfer session: a state going out, a state coming in."""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Protocol

from device.errors import DeviceError
from device.migration.memory import MAX_SECTION, PAGE, RUN, MemorySource, MemoryTarget, split
from device.migration.stream import MAX_PAYLOAD, Section, StreamReader, StreamWriter, refuse
from device.pci.memory_bar import MemoryBar

MEMORY = b"MEM\0"

# On-card memory is sent ahead whole, what changed meanwhile a few times more, and a last time after the stop.
# A card that is written to all the time must not keep a client reading.
PASSES_AHEAD = 8

# Runs of memory without changes, 4 MiB, that a read ahead of the stop looks at: a few milliseconds, in which
# no other card of the process is served. After the stop it goes on, for it must not give less than there is.
MAX_RUNS_IN_VAIN = 64

# Bytes of a stream beside on-card memory: the parts, of which a full loopback is the largest with 4 MiB.
MAX_STATE = 32 << 20


class Part(Protocol):
    """What of a card moves as a whole. The card is stopped, and its gate held, during all of these."""

    def save(self) -> bytes:
        """The state as bytes, at most stream.MAX_PAYLOAD."""

    def stage(self, data: bytes) -> Callable[[], None]:
        """Check what another card saved, and return what takes it over, which cannot fail.

        ValueError for bytes that no such part saves.
        """


class Outgoing:
    """The state of a card with `memory`, as it is asked for."""

    def __init__(self, identity: bytes, memory: Sequence[MemoryBar]) -> None:
        self._writer = StreamWriter(identity)
        self._memory = [MemorySource(bar) for bar in memory]
        self._sections: Iterator[Section | None] = self._changed()
        self._passes_left = PASSES_AHEAD
        self._found = False
        self._last = False
        self._lost: DeviceError | None = None

    def _changed(self) -> Iterator[Section | None]:
        """One pass over the memory, with None for runs without changes."""
        for source in self._memory:
            for payload in source.changed():
                yield None if payload is None else (MEMORY, payload)

    def finish(self, parts: Mapping[bytes, Part]) -> None:
        """The card has stopped: what is left of its memory, then `parts` as they are now, then the end."""
        saved = [(tag, part.save()) for tag, part in parts.items()]
        self._sections = chain(self._changed(), saved)
        self._last = True

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; fewer when there are no more, until `finish` for now: or when it
        would take long to find them.

        DeviceError(EIO), now and ever after, where memory is poisoned: a state without it is none.
        """
        if self._lost is not None:
            raise self._lost
        in_vain = 0
        while self._writer.waiting < size and in_vain < MAX_RUNS_IN_VAIN:
            try:
                section = next(self._sections)
            except StopIteration:
                self._pass_over()
                break
            except DeviceError as error:
                self._lost = error
                raise
            if section is None:
                in_vain += not self._last
            else:
                self._writer.section(*section)
                self._found = True
        return self._writer.take(size)

    def _pass_over(self) -> None:
        """End the stream, or let the next read look for changes; a pass that found none does not count."""
        if self._last:
            self._writer.finish()
            self._last = self._found = False
            self._passes_left = 0
            return
        self._passes_left -= self._found
        self._found = False
        if self._passes_left > 0:
            self._sections = self._changed()


class Incoming:
    """A state on its way into a card with `memory` and `parts`, which nobody sees before `apply`.

    What cannot become such a card's state is refused with DeviceError(EINVAL).
    """

    def __init__(self, identity: bytes, memory: Sequence[MemoryBar], parts: Mapping[bytes, Part]) -> None:
        room = sum(bar.backing for bar in memory)
        self._reader = StreamReader(
            identity,
            {MEMORY: MAX_SECTION, **dict.fromkeys(parts, MAX_PAYLOAD)},
            (PASSES_AHEAD + 1) * room * (PAGE + MAX_SECTION - RUN + 8) // PAGE + MAX_STATE,
        )
        self._parts = parts
        self._staged: dict[bytes, Callable[[], None]] = {}
        self._memory = {bar.index: MemoryTarget(bar) for bar in memory}
        self._refused: str | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes, in pieces of any size."""
        if self._refused:
            raise DeviceError(errno.EINVAL, self._refused)
        try:
            for tag, payload in self._reader.feed(data):
                self._take(tag, payload)
        except DeviceError as error:
            self._refused = error.strerror
            raise

    def _take(self, tag: bytes, payload: bytes) -> None:
        if tag == MEMORY:
            index, offset, pages = split(payload)
            if index not in self._memory:
                raise refuse(f"there is no memory in BAR {index}")
            self._memory[index].put(offset, pages)
        elif tag in self._staged:
            raise refuse(f"part {tag!r} comes twice")
        else:
            try:
                self._staged[tag] = self._parts[tag].stage(payload)
            except ValueError as error:
                raise refuse(f"part {tag!r}: {error}") from error

    def apply(self) -> None:
        """Make the card what came; DeviceError, and nothing has changed."""
        if self._refused:
            raise DeviceError(errno.EINVAL, self._refused)
        if not self._reader.complete:
            raise refuse("it does not go on to its end")
        if missing := self._parts.keys() - self._staged.keys():
            raise refuse(f"without parts {sorted(missing)}")
        for target in self._memory.values():
            target.check()
        for target in self._memory.values():
            target.apply()
        for tag in self._parts:
            self._staged[tag]()

    def close(self) -> None:
        """Forget what came."""
        for target in self._memory.values():
            target.close()
