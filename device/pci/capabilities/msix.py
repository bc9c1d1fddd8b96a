"""MSI-X (PCI Local Bus 3.0, 6.8.2)."""

from device.interrupts.msix import ENTRY_SIZE, MAX_VECTORS, pba_size
from device.pci.bars import LAST_BAR, Bar
from device.pci.capabilities.base import HEADER, Capability, Host
from device.pci.registers import At, Register, ro, rw


class MsixControl(Register, width=16):
    """TABLE_SIZE is the number of vectors less one."""

    TABLE_SIZE = ro(10, 0)
    FUNCTION_MASK = rw(14)
    ENABLE = rw(15)


class MsixLocation(Register, width=32):
    """A structure in a BAR, on a qword."""

    BAR = ro(2, 0)
    OFFSET = ro(31, 3)


class Msix(Capability):
    """`vectors` vectors, the table and the pending bit array (PBA) in register BARs; offsets are in bytes.

         31            24 23            16 15             8 7              0
        +----------------+----------------+----------------+----------------+
     00 | CONTROL                         | NEXT           | ID             |
     04 | TABLE                                                             |
     08 | PBA                                                               |
        +----------------+----------------+----------------+----------------+

    ValueError for a count outside 1 to 2048, and for places that are not multiples of 8 or do not fit their
    BAR.
    """

    ID = 0x11
    SIZE = 12
    LAYOUT = (
        *HEADER,
        At(0x02, "CONTROL", MsixControl),
        At(0x04, "TABLE", MsixLocation),
        At(0x08, "PBA", MsixLocation),
    )

    def __init__(
        self,
        vectors: int,
        *,
        table_bar: int,
        table_offset: int = 0,
        pba_bar: int | None = None,
        pba_offset: int,
    ) -> None:
        super().__init__()
        if not 1 <= vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} MSI-X vectors: a function has 1 to {MAX_VECTORS}")
        self.vectors = vectors
        self.table_bar, self.table_offset = table_bar, table_offset
        self.pba_bar, self.pba_offset = table_bar if pba_bar is None else pba_bar, pba_offset
        for bar, offset in ((self.table_bar, table_offset), (self.pba_bar, pba_offset)):
            if offset % 8 or not 0 <= bar <= LAST_BAR:
                raise ValueError(
                    f"an MSI-X structure at {offset:#x} of BAR {bar}: it must lie on a qword of BAR 0 to 5"
                )
        self.resets["CONTROL"] = MsixControl.build(TABLE_SIZE=vectors - 1)
        self.resets["TABLE"] = MsixLocation.build(BAR=self.table_bar, OFFSET=table_offset >> 3)
        self.resets["PBA"] = MsixLocation.build(BAR=self.pba_bar, OFFSET=pba_offset >> 3)

    def connect(self, host: Host) -> None:
        """Claim table and PBA in their BARs, and let the interrupts follow ENABLE and FUNCTION_MASK."""
        self._config = host.config
        self._interrupts = host.interrupts
        msix = host.interrupts.msix
        for name, bar_index, offset, size, handler in (
            ("MSI-X table", self.table_bar, self.table_offset, self.vectors * ENTRY_SIZE, msix.table),
            ("MSI-X PBA", self.pba_bar, self.pba_offset, pba_size(self.vectors), msix.pba),
        ):
            bar = host.bars.get(bar_index)
            if not isinstance(bar, Bar):
                raise ValueError(f"the {name} must lie in a register BAR, BAR {bar_index} is none")
            bar.claim(offset, size, handler, name=name)
        host.config.after_write(self.at("CONTROL"), MsixControl.SIZE, self._written)

    def _written(self, _old: int, _new: int) -> None:
        self.adopt()

    def adopt(self) -> None:
        """Hand ENABLE and FUNCTION_MASK to the interrupts."""
        control = self._config.load(self.at("CONTROL"), MsixControl.SIZE)
        self._interrupts.configure_msix(
            enabled=bool(MsixControl.ENABLE.get(control)),
            function_mask=bool(MsixControl.FUNCTION_MASK.get(control)),
        )
