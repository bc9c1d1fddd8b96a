"""The ways in which a card stops to answer at its BARs, and comes back."""

from __future__ import annotations

from enum import Enum
from typing import Self

import client
from client.pci import CapabilityId, Command, ConfigSpace, PciControl, read_config
from protocol.vfio import RegionIndex

D3_HOT = 3
INITIATE_RESET = 1 << 15


class Way(Enum):
    """How the device's memory goes away; it keeps its bytes unless that is a reset."""

    COMMAND = "command"
    D3 = "d3"
    FLR = "flr"
    RESET = "reset"

    @property
    def keeps(self) -> bool:
        """Whether the bytes are there again afterwards."""
        return self in (Way.COMMAND, Way.D3)


class Switch:
    """Switches the memory of one card off and on; it is on at first."""

    def __init__(self, session: client.Session, config: ConfigSpace) -> None:
        self.session = session
        self._power = self._at(config, CapabilityId.PM, 4)
        self._control = self._at(config, CapabilityId.PCIE, 8)

    @staticmethod
    def _at(config: ConfigSpace, capability: CapabilityId, register: int) -> int:
        found = config.find(capability)
        assert found is not None
        return found.offset + register

    @classmethod
    async def of(cls, session: client.Session) -> Self:
        made = cls(session, await read_config(session))
        await made.on()
        return made

    async def off(self, way: Way) -> None:
        """Return when the device does not answer any more."""
        match way:
            case Way.COMMAND:
                await self._command(False)
            case Way.D3:
                await self._config(self._power, D3_HOT)
            case Way.FLR:
                await self._config(self._control, INITIATE_RESET)
            case Way.RESET:
                await self.session.reset()

    async def on(self, way: Way = Way.COMMAND) -> None:
        """Return when it answers again."""
        if way is Way.D3:
            await self._config(self._power, 0)
        else:
            await self._command(True)

    async def _command(self, on: bool) -> None:
        """The other bits stay: a driver may have set some."""
        pci = PciControl(self.session, await read_config(self.session))
        await pci.set_command(Command.MEMORY, on=on)

    async def _config(self, offset: int, value: int) -> None:
        await self.session.region_write(RegionIndex.CONFIG, offset, value.to_bytes(2, "little"))
