"""What all capabilities have in common: an identifier, a place in the list, registers."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from device.interrupts.controller import Interrupts
from device.pci.bars import Accesses, Bar
from device.pci.config_space import CAPABILITIES_END, HEADER_SIZE, ConfigSpace
from device.pci.memory_bar import MemoryBar
from device.pci.registers import At, Byte

HEADER = (At(0x00, "ID", Byte), At(0x01, "NEXT", Byte))


class Host(Protocol):
    """The function, as far as its capabilities act on it."""

    @property
    def config(self) -> ConfigSpace:
        """Where the capability's registers are."""

    @property
    def bars(self) -> Mapping[int, Bar | MemoryBar]:
        """By BAR index."""

    def region_accesses(self, index: int) -> Accesses:
        """What answers accesses to a BAR."""

    @property
    def interrupts(self) -> Interrupts:
        """What MSI and MSI-X registers govern."""

    def function_level_reset(self) -> None:
        """Everything to power-on values, the interrupt wiring kept."""


class Capability:
    """A structure in configuration space, declared by `ID`, `SIZE` (bytes) and `LAYOUT`.

    An instance changes reset values through `resets` and writable bits through `writable`, both by register
    name.
    """

    ID: ClassVar[int]
    SIZE: ClassVar[int]
    LAYOUT: ClassVar[tuple[At, ...]]

    def __init__(self) -> None:
        self.offset = 0
        self.resets: dict[str, int] = {}
        self.writable: dict[str, int] = {}

    def place(self, config: ConfigSpace, offset: int, following: int) -> None:
        """Put the registers at `offset`, pointing to the capability at `following` (0: the last one)."""
        self.offset = offset
        resets = {"ID": self.ID, "NEXT": following} | self.resets
        for at in self.LAYOUT:
            config.place(
                offset + at.offset,
                at.register,
                reset=resets.get(at.name),
                writable=self.writable.get(at.name),
            )

    def at(self, name: str) -> int:
        """The offset in configuration space of the register `name`; KeyError if there is none."""
        for at in self.LAYOUT:
            if at.name == name:
                return self.offset + at.offset
        raise KeyError(name)

    def connect(self, host: Host) -> None:
        """Act on `host` from now on; ValueError if the capability does not fit it."""

    def adopt(self) -> None:
        """The registers were reset: let the function follow their values."""


def arrange(capabilities: Sequence[Capability]) -> list[int]:
    """Offsets for `capabilities` from 0x40 upward, each on a dword.

    ValueError when they do not fit below 0x100.
    """
    offsets = []
    position = HEADER_SIZE
    for capability in capabilities:
        offsets.append(position)
        position += capability.SIZE + 3 & ~3
    if position > CAPABILITIES_END:
        raise ValueError(
            f"the capabilities take {position - HEADER_SIZE} bytes of {CAPABILITIES_END - HEADER_SIZE}"
        )
    return offsets


def place_all(config: ConfigSpace, capabilities: Sequence[Capability], offsets: Sequence[int]) -> None:
    """Put `capabilities` at `offsets`, linked in that order."""
    following = 0
    for capability, offset in reversed(list(zip(capabilities, offsets, strict=True))):
        capability.place(config, offset, following)
        following = offset
