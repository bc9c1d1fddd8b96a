"""A function that can be moved: its migration state, and the data that goes out and comes in.

The source's state is taken when it stops for the last time, in one moment; only on-card memory goes ahead of
it. A destination keeps what comes beside what it is, checks each piece as it comes, and becomes it at
RESUMING -> STOP, all or nothing.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING

from device.errors import DeviceError
from device.migration.sessions import Incoming, Outgoing, Part
from device.migration.states import RUNNING_STATES, DeviceState, MigrationFlags, path
from device.migration.stream import encode_identity
from device.pci.bars import Bar
from device.pci.memory_bar import MemoryBar

if TYPE_CHECKING:
    from device.function import PciFunction

log = logging.getLogger(__name__)

S = DeviceState


class Migration:
    """`function`'s; make it when the function is whole, and set `function.migration` to it.

    `parts` are saved, and take over, in their order, after configuration space and interrupts; tags have four
    bytes. `traits` are what a source and its destination must have in common besides what the function shows
    of itself: name and value, a line of text each. They come first: a refusal names the first that differs.

    `arrivals` counts the cards that this one took over. To tell the network is the model's affair.
    """

    flags = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY

    def __init__(
        self,
        function: PciFunction,
        parts: dict[bytes, Part] | None = None,
        traits: dict[str, str] | None = None,
    ) -> None:
        self._function = function
        self.parts: dict[bytes, Part] = {
            b"CONF": _Configuration(function),
            b"IRQS": function.interrupts,
            **(parts or {}),
        }
        self.identity = encode_identity({**(traits or {}), **_traits(function)})
        self._state = S.RUNNING
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self.arrivals = 0
        self._actions: dict[tuple[DeviceState, DeviceState], Callable[[], None]] = {
            (S.RUNNING, S.STOP): function.stop,
            (S.RUNNING, S.PRE_COPY): self._begin_saving,
            (S.STOP, S.RUNNING): function.run,
            (S.STOP, S.STOP_COPY): self._save,
            (S.STOP, S.RESUMING): self._begin_resuming,
            (S.STOP_COPY, S.STOP): self._end_saving,
            (S.RESUMING, S.STOP): self._take_over,
            (S.PRE_COPY, S.RUNNING): self._end_saving,
            (S.PRE_COPY, S.STOP_COPY): self._stop_and_save,
        }

    @property
    def state(self) -> DeviceState:
        """Where the function stands now."""
        return self._state

    def set_state(self, new: int) -> None:
        """Go to `new` by the shortest way; all of it is done when this returns.

        DeviceError(EINVAL) when no way leads there, and nothing has changed; or when the data that came are
        not a whole state of such a card, or EIO when its memory is poisoned, and the function is as it was
        but in ERROR, where it stays until it is reset. PinnedError, and nothing has changed, when the card is
        to stop while somebody holds memory of the client's.
        """
        with self._function.gate:
            if self.would_stop(new):
                self._function.dma.pins.check()
            for following in path(self._state, new):
                log.info("%s: %s -> %s", self._function.name, self._state.name, following.name)
                self._actions[self._state, following]()
                self._state = following

    def would_stop(self, new: int) -> bool:
        """Whether going to `new` would stop the card, which runs now; DeviceError(EINVAL) as `set_state`."""
        return self._state in RUNNING_STATES and not RUNNING_STATES.issuperset(path(self._state, new))

    def read(self, size: int) -> bytes:
        """The next bytes of the state, at most `size`; fewer when there are no more, in PRE_COPY for now.

        DeviceError(EINVAL) unless the state is PRE_COPY or STOP_COPY.
        """
        if self._outgoing is None or size < 0:
            raise DeviceError(
                errno.EINVAL, f"there are no {size} bytes of migration data in {self._state.name}"
            )
        return self._outgoing.read(size)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes of another card's state, in pieces of any size.

        DeviceError(EINVAL) unless the state is RESUMING, and as soon as they cannot become this card's: then
        only a reset is left.
        """
        if self._incoming is None:
            raise DeviceError(errno.EINVAL, f"no migration data are taken in {self._state.name}")
        with self._function.gate:
            self._incoming.write(data)

    def reset(self) -> None:
        """Back to RUNNING, whatever the state: sessions end, and what came is forgotten."""
        self._end_saving()
        self._end_resuming()
        self._state = S.RUNNING

    # --- what is done on the arcs

    def _memory(self) -> list[MemoryBar]:
        return [bar for bar in self._function.bars.values() if isinstance(bar, MemoryBar)]

    def _begin_saving(self) -> None:
        self._outgoing = Outgoing(self.identity, self._memory())

    def _save(self) -> None:
        outgoing = self._outgoing or Outgoing(self.identity, self._memory())
        outgoing.finish(self.parts)
        self._outgoing = outgoing

    def _stop_and_save(self) -> None:
        self._function.stop()
        try:
            self._save()
        except BaseException:
            self._function.run()  # as PRE_COPY has it, where it stays
            raise

    def _end_saving(self) -> None:
        self._outgoing = None

    def _begin_resuming(self) -> None:
        self._incoming = Incoming(self.identity, self._memory(), self.parts)

    def _take_over(self) -> None:
        assert self._incoming is not None
        try:
            self._incoming.apply()
        except BaseException:
            self._state = S.ERROR
            raise
        finally:
            self._end_resuming()
        self.arrivals += 1

    def _end_resuming(self) -> None:
        if self._incoming is not None:
            self._incoming.close()
            self._incoming = None


class _Configuration:
    """Configuration space as a part: what follows from its registers changes with them."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function

    def save(self) -> bytes:
        return self._function.config.save()

    def stage(self, data: bytes) -> Callable[[], None]:
        replace = self._function.config.stage(data)
        return lambda: self._function.replace_registers(replace)


def _traits(function: PciFunction) -> dict[str, str]:
    """What the function shows of itself, for people first; the last line has all of configuration space."""
    config = function.config
    bars = ", ".join(
        f"{bar.index}: {bar.kind.name} {bar.size:#x} {_content(bar)}" for bar in function.bars.values()
    )
    return {
        "function": f"{config.load(0, 2):04x}:{config.load(2, 2):04x}",
        "subsystem": f"{config.load(0x2C, 2):04x}:{config.load(0x2E, 2):04x}",
        "bars": bars,
        "capabilities": ", ".join(f"{part.ID:02x} at {part.offset:#x}" for part in function.capabilities),
        "configuration": blake2b(config.declared(), digest_size=16).hexdigest(),
    }


def _content(bar: Bar | MemoryBar) -> str:
    if isinstance(bar, Bar):
        return "registers"
    return "memory" if bar.backing >= bar.size else f"memory of {bar.backing:#x}"
