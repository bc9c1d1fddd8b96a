"""MSI-X: a table entry for each vector and the pending bit array (PCI Local Bus 3.0, 6.8.2).

Message addresses and data are kept for whoever reads them back; delivery goes by eventfd. The mask bit of an
entry is set at power-on, and plugging an eventfd into the vector clears it: QEMU shows its guest a table of
its own and never writes this one, just as a host kernel's request_irq, not vfio's user, unmasks the entry of
a real card. A mask bit written later counts.
"""

from collections.abc import Callable

from device.interrupts._bank import VectorBank
from device.interrupts._lines import Lines

MAX_VECTORS = 2048  # eleven bits of TABLE_SIZE
ENTRY_SIZE = 16  # address, upper address, data, vector control
VECTOR_CONTROL = 12
MASK_BIT = 1


def pba_size(vectors: int) -> int:
    """Bytes of the pending bit array: whole qwords."""
    return (vectors + 63) // 64 * 8


class MsixBank(VectorBank):
    """Vectors with a table entry each, and `table` and `pba` as BAR sub-ranges."""

    def __init__(self, lines: Lines, count: int) -> None:
        super().__init__(lines, count)
        self.function_mask = False
        self._entries = bytearray(count * ENTRY_SIZE)
        self._arrived = bytearray(
            count
        )  # entries of wired vectors of a card that came here, wired anew or not
        self.table = _Table(self, self._entries)
        self.pba = _Pba(self)
        self.reset()

    def masked(self, vector: int) -> bool:
        """The function mask or the mask bit of the vector's entry."""
        return self.function_mask or bool(self._entries[vector * ENTRY_SIZE + VECTOR_CONTROL] & MASK_BIT)

    def plugged(self, vector: int) -> None:
        """Clear the entry's mask bit, unless the vector was wired where the card came from."""
        if self._arrived[vector]:
            self._arrived[vector] = False
        else:
            self._entries[vector * ENTRY_SIZE + VECTOR_CONTROL] = 0

    def configure(self, *, enabled: bool, function_mask: bool) -> None:
        """Follow the capability's registers."""
        self.enabled = enabled
        if function_mask != self.function_mask:
            self.function_mask = function_mask
            self.refresh_all()

    def reset(self) -> None:
        """Entries to power-on values: zero and masked, but for those with an eventfd.

        They come back unmasked because a client that shows its guest a table of its own will not write this
        one: after a reset through vfio the host kernel restores the real table (pci_restore_msi_state), and
        the vectors go on working.
        """
        self._entries[:] = bytes(len(self._entries))
        self._arrived[:] = bytes(self.count)
        for vector in range(self.count):
            if self.fd(vector) is None:
                self._entries[vector * ENTRY_SIZE + VECTOR_CONTROL] = MASK_BIT
        self.refresh_all()

    def save(self) -> bytes:
        """The entries, and for each vector whether it is wired, or was where the card came from."""
        wired = (self._arrived[vector] or self.fd(vector) is not None for vector in range(self.count))
        return bytes(self._entries) + bytes(wired)

    def stage(self, data: bytes) -> Callable[[], None]:
        """What makes the entries those of `data`, which another card saved; ValueError if it cannot be.

        A mask bit that nobody wrote there, for the vector was not wired, does not hold back one that is wired
        here; a mask bit that was written does, wherever and whenever the vector is wired.
        """
        entries, wired = data[: len(self._entries)], data[len(self._entries) :]
        controls = (entries[at : at + 4] for at in range(VECTOR_CONTROL, len(entries), ENTRY_SIZE))
        if len(wired) != self.count or not set(wired) <= {0, 1}:
            raise ValueError(f"{len(data)} bytes for {self.count} MSI-X entries")
        if any(int.from_bytes(control, "little") > MASK_BIT for control in controls):
            raise ValueError("a vector control with bits that no entry has")

        def apply() -> None:
            self._entries[:] = entries
            self._arrived[:] = wired
            for vector in range(self.count):
                if self.fd(vector) is not None:
                    self.plugged(vector)
            self.refresh_all()

        return apply


class _Table:
    """The table as a sub-range of a BAR."""

    def __init__(self, bank: MsixBank, entries: bytearray) -> None:
        self._bank = bank
        self._entries = entries

    def read(self, offset: int, count: int) -> int:
        return int.from_bytes(self._entries[offset : offset + count], "little")

    def write(self, offset: int, count: int, value: int) -> None:
        self._entries[offset : offset + count] = value.to_bytes(count, "little")
        vector, within = divmod(offset, ENTRY_SIZE)
        if within + count > VECTOR_CONTROL:
            control = vector * ENTRY_SIZE + VECTOR_CONTROL
            self._entries[control : control + 4] = bytes([self._entries[control] & MASK_BIT, 0, 0, 0])
            self._bank.refresh(vector)


class _Pba:
    """The pending bit array as a sub-range of a BAR; software cannot change it."""

    def __init__(self, bank: MsixBank) -> None:
        self._bank = bank

    def read(self, offset: int, count: int) -> int:
        return self._bank.pending_bits(offset * 8, count * 8)

    def write(self, offset: int, count: int, value: int) -> None:
        """Drop it."""
