"""The network card's registers where the host finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from device.card import NetworkCard
from device.function import IrqKind, RegionIndex, ResetKind
from device.pci.capabilities import VirtioCfgType
from device.profiles import ISR, MSIX_PBA, MSIX_TABLE, Vectors
from device.virtio.features import Feature
from device.virtio.transport import Isr
from tests.device.interrupts.listener import Listener, listeners
from tests.device.migration.moves import move

CONFIG = RegionIndex.CONFIG
COMMAND, STATUS = 0x04, 0x06
INTX_DISABLE = 1 << 10
INTERRUPT = 1 << 3  # of STATUS
MSIX, VENDOR = 0x11, 0x09  # capability IDs
QUEUE_VECTOR = 1
VECTORS = Vectors.PER_QUEUE.count


class Quiet:
    """A device type that does nothing."""

    def offered_features(self) -> Feature:
        return Feature.VERSION_1

    def driver_ready(self, features: int) -> None: ...

    def driver_gone(self) -> None: ...

    def notified(self, queue: int) -> None: ...

    def read_config(self, offset: int, count: int) -> bytes:
        return bytes(count)


class Rig:
    """A card and the host's listeners, one a vector."""

    def __init__(self, ears: list[Listener]) -> None:
        self.ears = ears
        self.card = NetworkCard(Quiet(), bar2_size=4096)
        self.function = self.card.function
        self.card.make_movable({}, {})
        self.msix_control = self.find(MSIX) + 2
        self.window = self.find(VENDOR, VirtioCfgType.PCI_CFG)

    def find(self, kind: int, cfg_type: int | None = None) -> int:
        """Where in configuration space a capability is (PCI Local Bus 3.0, 6.7)."""
        at = self.config(0x34, 1)
        while at:
            if self.config(at, 1) == kind and cfg_type in (None, self.config(at + 3, 1)):
                return at
            at = self.config(at + 1, 1)
        raise AssertionError(f"no capability {kind:#x}")

    def config(self, offset: int, count: int) -> int:
        return int.from_bytes(self.function.region_read(CONFIG, offset, count), "little")

    def configure(self, offset: int, count: int, value: int) -> None:
        self.function.region_write(CONFIG, offset, value.to_bytes(count, "little"))

    def used(self) -> None:
        """The card has used a buffer."""
        self.function.interrupts.lines.signal(Isr.QUEUE, QUEUE_VECTOR)

    def read_isr(self) -> int:
        return self.function.region_read(0, ISR, 1)[0]

    def read_isr_by_window(self) -> int:
        """Through virtio's access to BARs by configuration space (virtio 1.3, 4.1.4.9)."""
        self.configure(self.window + 4, 1, 0)
        self.configure(self.window + 8, 4, ISR)
        self.configure(self.window + 12, 4, 1)
        return self.config(self.window + 16, 1)

    @property
    def shown(self) -> bool:
        """The level as the driver sees it in STATUS."""
        return bool(self.config(STATUS, 2) & INTERRUPT)

    def wire_intx(self) -> None:
        self.function.irq_set_trigger(IrqKind.INTX, 0, [self.ears[0].fd])

    def wire_msix(self) -> None:
        self.function.irq_set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in self.ears])

    def heard(self) -> list[int]:
        return [ear.heard() for ear in self.ears]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with listeners(VECTORS) as ears:
        rig = Rig(ears)
        yield rig
        rig.function.close()


@pytest.mark.parametrize("read", [Rig.read_isr, Rig.read_isr_by_window])
def test_reading_the_isr_drops_the_level_and_status_follows(rig: Rig, read: Callable[[Rig], int]) -> None:
    rig.wire_intx()
    rig.used()
    assert rig.heard()[0] == 1
    assert rig.shown
    assert read(rig) == Isr.QUEUE
    assert not rig.shown
    assert read(rig) == 0
    rig.function.irq_unmask(IrqKind.INTX, 0, [True])
    assert rig.heard()[0] == 0, "it was served"
    rig.used()
    assert rig.heard()[0] == 1


@pytest.mark.parametrize("read", [Rig.read_isr, Rig.read_isr_by_window])
def test_reading_the_isr_takes_nothing_from_msix(rig: Rig, read: Callable[[Rig], int]) -> None:
    rig.wire_msix()
    rig.configure(rig.msix_control, 2, 0xC000)
    rig.used()
    assert read(rig) == Isr.QUEUE
    assert rig.function.region_read(0, MSIX_PBA, 1) == bytes([1 << QUEUE_VECTOR])
    rig.configure(rig.msix_control, 2, 0x8000)
    assert rig.heard() == [0, 1, 0, 0]
    assert not rig.shown


def test_a_level_that_waited_through_msix_is_signalled_once_when_intx_is_back(rig: Rig) -> None:
    rig.wire_intx()
    rig.used()
    rig.function.irq_disable(IrqKind.INTX)
    rig.wire_msix()
    assert rig.heard() == [1, 0, 0, 0], "the line's, and no vector's"
    rig.function.irq_disable(IrqKind.MSIX)
    rig.wire_intx()
    assert rig.heard() == [1, 0, 0, 0]


def test_a_level_served_under_msix_is_gone_when_intx_is_back(rig: Rig) -> None:
    rig.wire_intx()
    rig.used()
    rig.function.irq_disable(IrqKind.INTX)
    rig.wire_msix()
    rig.read_isr()
    rig.function.irq_disable(IrqKind.MSIX)
    rig.wire_intx()
    assert rig.heard() == [1, 0, 0, 0], "the first alone"


def test_a_pending_vector_does_not_become_a_level(rig: Rig) -> None:
    rig.wire_msix()
    rig.configure(rig.msix_control, 2, 0xC000)
    rig.used()
    rig.configure(rig.msix_control, 2, 0x4000)
    rig.function.irq_disable(IrqKind.MSIX)
    rig.wire_intx()
    assert rig.heard() == [0, 0, 0, 0]
    assert not rig.shown
    rig.function.irq_disable(IrqKind.INTX)
    rig.wire_msix()
    assert rig.heard() == [0, 0, 0, 0]
    assert rig.function.region_read(0, MSIX_PBA, 8) == bytes(8)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_the_table_is_written_in_pieces_of_any_width(rig: Rig, width: int) -> None:
    entry = MSIX_TABLE + 16 * QUEUE_VECTOR
    masked = bytes.fromhex("0410e0fe 00000000 21400000 01000000")
    rig.wire_msix()
    for offset in range(0, 16, width):
        rig.function.region_write(0, entry + offset, masked[offset : offset + width])
    assert rig.function.region_read(0, entry, 16) == masked
    rig.used()
    assert rig.heard() == [0, 0, 0, 0]
    unmasked = masked[:12] + bytes(4)
    offset = 12 - 12 % width  # the piece with the mask bit
    rig.function.region_write(0, entry + offset, unmasked[offset : offset + width])
    assert rig.heard() == [0, 1, 0, 0]


@pytest.mark.parametrize("kind", [ResetKind.DEVICE, ResetKind.FLR])
def test_a_reset_clears_intx_disable_and_what_it_held_back(rig: Rig, kind: ResetKind) -> None:
    rig.wire_intx()
    rig.configure(COMMAND, 2, INTX_DISABLE)
    rig.used()
    rig.function.reset(kind)
    assert not rig.shown
    assert rig.read_isr() == 0
    assert rig.heard()[0] == 0
    rig.used()
    assert rig.heard()[0] == 1


@pytest.mark.parametrize("saved", [0, INTX_DISABLE])
def test_a_state_that_comes_here_brings_level_and_intx_disable(rig: Rig, saved: int) -> None:
    rig.used()
    rig.configure(COMMAND, 2, saved)
    with listeners(VECTORS) as ears:
        other = Rig(ears)
        other.wire_intx()
        other.configure(COMMAND, 2, INTX_DISABLE - saved)
        move(rig.function, other.function)
        assert other.heard()[0] == (saved == 0)
        assert other.shown
        other.configure(COMMAND, 2, 0)
        assert other.heard()[0] == (saved != 0)
        other.function.close()
