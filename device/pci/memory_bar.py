"""A BAR of memory that the host maps."""

import errno
from collections.abc import Iterator

from device.errors import DeviceError
from device.pci._bar_memory import BarMemory, Revocable, Sealed
from device.pci._memfd import PAGE
from device.pci.bars import BarKind, Data, check_bar
from device.revocation import Revocation


class MemoryBar:
    """`size` bytes of memory in a file of their own; zero at power-on. A BAR smaller than a page is mapped as
    the one page that it begins.

    `backing` is how many bytes there really are, whole pages: beyond them the BAR reads all ones, swallows
    writes and cannot be mapped. ValueError if no such BAR can exist, OSError if there is no memory for it.

    `revocation` says what becomes of mappings while the BAR is not decoded, which it is not at power-on. Its
    own accesses never fault, whatever a client does to the file: they read all ones where the client has
    shortened it.
    """

    def __init__(
        self,
        index: int,
        size: int,
        *,
        kind: BarKind = BarKind.MEM64,
        prefetchable: bool = True,
        revocation: Revocation = Revocation.COOPERATIVE,
        backing: int | None = None,
    ) -> None:
        check_bar(index, size, kind)
        whole = max(size, PAGE)
        if backing is None:
            backing = whole
        if backing % PAGE or not 0 < backing <= whole:
            raise ValueError(f"BAR {index}: {backing:#x} bytes are not whole pages of its {size:#x}")
        self.index = index
        self.size = size
        self.kind = kind
        self.prefetchable = prefetchable
        self.revocation = revocation
        self.backing = backing
        self._poisoned: set[int] = set()
        self._decoded = False
        self._memory: BarMemory = self._create()

    def _create(self) -> BarMemory:
        name = f"bar{self.index}"
        if self.revocation is Revocation.ENFORCED:
            return Revocable(name, self.backing)
        return Sealed(name, self.backing)

    @property
    def fd(self) -> int:
        """The file that is mapped, the BAR's. Another one after `renew`."""
        return self._memory.fd

    @property
    def mmap_areas(self) -> tuple[tuple[int, int], ...]:
        """What of the BAR can be mapped, now or when it is decoded: (offset, length), in bytes."""
        return ((0, min(self.size, self.backing)),)

    # --- accesses

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes, decoded or not.

        DeviceError: EINVAL outside the BAR, EIO where a page is poisoned.
        """
        self._check(offset, count)
        there = max(min(self.backing - offset, count), 0)
        return self.load(offset, there).ljust(count, b"\xff")

    def write(self, offset: int, data: Data) -> None:
        """Write `data`, decoded or not; refusals as those of `read`, and nothing is written then."""
        self._check(offset, len(data))
        self.store(offset, memoryview(data)[: max(self.backing - offset, 0)])

    def load(self, offset: int, count: int) -> bytes:
        """The device's side: any of the `backing` bytes. DeviceError(EIO) where a page is poisoned."""
        self._refuse_poisoned(offset, count)
        return self._memory.read(offset, count)

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """The device's side of a write, as `load`."""
        self._refuse_poisoned(offset, len(data))
        self._memory.write(offset, data)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Where `load` finds anything but zeros, if it does: (start, end) of whole pages, in no order."""
        yield from self._memory.extents()
        for page in self._poisoned:
            yield page, page + PAGE

    def _check(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise DeviceError(
                errno.EINVAL,
                f"BAR {self.index}: {count} bytes at {offset:#x} lie outside {self.size:#x} bytes",
            )

    def _refuse_poisoned(self, offset: int, count: int) -> None:
        for page in self._poisoned:
            if offset < page + PAGE and page < offset + count:
                raise DeviceError(errno.EIO, f"BAR {self.index}: the page at {page:#x} is poisoned")

    # --- who reaches it

    def decode(self, enabled: bool) -> None:
        """The function decodes the BAR from now on, or no more.

        What mappings reach follows that, if it is enforced; the memory stays as it is. DeviceError(EIO) if
        the system was short of memory: mappings are taken away all the same, or do not come back.
        """
        self._decoded = enabled
        self._memory.show(min(self._poisoned, default=self.backing) if enabled else 0)

    def poison(self, offset: int) -> None:
        """The page at `offset` is lost: accesses to it are refused with EIO, and no mapping reaches it or
        what follows it. Only `repair` heals it.

        DeviceError: EINVAL where there is no memory, EOPNOTSUPP if mappings cannot be taken away; EIO as
        `decode`.
        """
        if not 0 <= offset < self.backing:
            raise DeviceError(errno.EINVAL, f"BAR {self.index}: there is no memory at {offset:#x}")
        if not isinstance(self._memory, Revocable):
            raise DeviceError(errno.EOPNOTSUPP, f"BAR {self.index}: its memory is sealed")
        page = offset - offset % PAGE
        self._poisoned.add(page)
        try:
            self.decode(self._decoded)
        finally:
            self._memory.forget(page, page + PAGE)

    @property
    def poisoned(self) -> bool:
        """Whether a page of it is lost, until `repair`."""
        return bool(self._poisoned)

    def repair(self) -> None:
        """Pages that were poisoned are zero, and answer again; DeviceError(EIO) as `decode`."""
        self._poisoned.clear()
        self.decode(self._decoded)

    # --- life

    def clear(self) -> None:
        """All zero again.

        What mappings reach is taken away, if that is enforced, until `decode` is called; else they see zeros.
        """
        self._memory.clear()

    def renew(self) -> None:
        """New memory, all zero, and as `clear` leaves it.

        Mappings of the old one, such as those of a client that left, no longer reach the card. OSError, and
        the memory is the old one, if there is none for it.
        """
        old, self._memory = self._memory, self._create()
        old.close()

    def close(self) -> None:
        """Give the memory back; the BAR is of no use afterwards."""
        self._memory.close()
