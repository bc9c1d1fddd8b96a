"""A driver that moves from card to card, and frames that can be told apart."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from device.function import ResetKind
from firmware import Nic
from firmware.ports import open_port
from tests.device.migration.moves import load, saved
from tests.firmware.driver import MSIX, Driver
from tests.firmware.test_nic import MAC, frame

NONE_OWED = struct.pack("<HH", 0, 0)


class Travellers:
    """A driver and the cards it has been on; the first is the one it starts with."""

    def __init__(self, make: Callable[[], Nic]) -> None:
        self.make = make
        self.driver = Driver(make())
        self.cards = [self.driver.nic]

    def another(self, make: Callable[[], Nic] | None = None) -> Nic:
        """A card that has the driver's memory and its interrupts, and no state yet."""
        made = (make or self.make)()
        self.cards.append(made)
        self.welcome(made)
        return made

    def welcome(self, nic: Nic) -> None:
        with nic.function.gate:
            self.driver.memory.map_into(nic.function.dma)
        nic.function.irq_set_trigger(MSIX, 0, self.driver.fds)

    def move(self, target: Nic, *, ahead: bool = True) -> None:
        """The driver goes on with `target`; the card it leaves loses its client."""
        source = self.driver.nic
        load(target.function, saved(source.function, ahead=ahead))
        self.driver.nic, self.driver.function = target, target.function
        source.function.reset(ResetKind.LOST_CLIENT)

    def close(self) -> None:
        for nic in self.cards:
            nic.close()
        self.driver.close()


@contextmanager
def travelling(make: Callable[[], Nic]) -> Iterator[Travellers]:
    made = Travellers(make)
    try:
        yield made
    finally:
        made.close()


def loopback() -> Nic:
    return Nic(open_port("loopback"), mac=MAC, bar2_size=1 << 16)


def number(data: bytes) -> int:
    return int(struct.unpack_from(">I", data, 14)[0])


def numbered(value: int, length: int = 60) -> bytes:
    return frame(struct.pack(">I", value).ljust(length, b"."), MAC)
